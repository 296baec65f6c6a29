"""A reward model as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.encoding import encode
from lightning_lora.data.records import Conversation
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.tokenizer import find_tokenizer
from lightning_lora.errors import RewardSettingError
from lightning_lora.files.adapter.peft_format import CONFIG_FILE, recorded_base
from lightning_lora.files.adapter.save_load import load_adapter
from lightning_lora.tasks.loading import head_names, load_model, read_config


class ModelReward:
    """Scores completions with a reward model: a sequence classifier of one output.

    The model stays in the process that trains and sees all rows at once, which `RewardPool` knows.

    Args:
        model: The folder or hub name of an ``AutoModelForSequenceClassification``, or an adapter folder of a
            ``RewardModel``, which names its base.
        tokenizer: The folder or hub name of its tokenizer. None takes the one beside the model.
        batch_size: Rows that are scored together.
        max_length: Tokens of prompt and completion that are read, from the beginning.
        device: Where the model is. None takes a GPU if there is one.
        dtype: The type of its weights.

    Raises:
        ConfigError: If the model cannot be loaded, or has more than one output.
    """

    sees_all_rows = True

    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        batch_size: int = 16,
        max_length: int = 2048,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        self._settings = RowSettings(max_length=max_length)
        self.batch_size = batch_size
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        is_adapter = (Path(model) / CONFIG_FILE).is_file()
        base = recorded_base(Path(model)) if is_adapter else model
        if not base:
            raise RewardSettingError(f"{model} does not say on which base it was trained.")
        # A published reward model says how many outputs it has; the base of an adapter does not.
        config = read_config(base, **({"num_labels": 1} if is_adapter else {}))
        loaded = load_model(
            AutoModelForSequenceClassification, base, new_head=is_adapter, config=config, dtype=getattr(torch, dtype)
        )
        if loaded.config.num_labels != 1:
            raise RewardSettingError(f"{model} has {loaded.config.num_labels} outputs; a reward model has one.")
        if is_adapter:
            load_adapter(loaded, model)
        has_tokenizer = (Path(model) / "tokenizer_config.json").is_file()
        self.tokenizer = find_tokenizer(tokenizer or (model if has_tokenizer else base), None)
        self.model: Any = loaded.eval().requires_grad_(False).to(self.device)  # pyright: ignore[reportArgumentType]
        (self._head,) = head_names(loaded)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        """Scores of rows: texts are a question and its answer, messages a conversation and its last turn."""
        rows = [self._conversation(number, *row) for number, row in enumerate(zip(prompts, completions, strict=True))]
        ids: list[Tensor] = []
        for encoded in encode(self.tokenizer, rows, self._settings):
            if isinstance(encoded, RowError):
                raise encoded
            # Several parts of a conversation end with the last one.
            ids.append(torch.tensor(encoded[-1].ids[: self._settings.max_length]))
        scores: list[float] = []
        for start in range(0, len(ids), self.batch_size):
            scores += self._scores(ids[start : start + self.batch_size]).tolist()
        return scores

    def _scores(self, rows: list[Tensor]) -> Tensor:
        """The output at the last token of each row, ``(rows,)``."""
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        mask = torch.arange(ids.shape[1], device=self.device) < lengths.unsqueeze(-1)
        of_head: list[Tensor] = []
        # transformers takes the last token that is not a padding token, which an end of turn may be too.
        handle = self.model.get_submodule(self._head).register_forward_hook(lambda *called: of_head.append(called[-1]))
        try:
            scores = self.model(input_ids=ids, attention_mask=mask.long()).logits
        finally:
            handle.remove()
        if of_head[0].dim() == 3:
            scores = of_head[0][torch.arange(len(rows), device=self.device), lengths - 1]
        return scores.float().squeeze(-1)

    def _conversation(self, number: int, prompt: Any, completion: Any) -> Conversation:
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        return Conversation(f"row {number}", [*asked, *said])
