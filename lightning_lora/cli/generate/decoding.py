"""Token ids to the token ids that a model continues them with: in batches, by the loop of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lightning_lora.errors import ConfigError
from lightning_lora.tasks.loading import context_length

if TYPE_CHECKING:  # the modules import torchao, bitsandbytes and peft
    from transformers import PreTrainedModel
    from transformers.generation.stopping_criteria import StoppingCriteria
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: Tokens of an answer at most, its end token included.
        temperature: 0 always takes the most probable token. Above 0, tokens are drawn from the probabilities of the
            logits divided by it.
        top_p: Only the most probable tokens, until their probabilities add up to this, are drawn from.
        top_k: Only so many of the most probable tokens are drawn from. 0 leaves all.
        seed: Seeds the draws.
        batch_size: Prompts that are answered together.
        use_cache: Whether keys and values of earlier tokens are kept.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    batch_size: int = 8
    use_cache: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("top_k", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be a whole number of {least} or more, got {getattr(self, name)}.")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be a finite number of at least 0, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise ConfigError(
                "top_p and top_k choose among tokens to draw, and temperature 0 draws none: give a temperature above "
                "0, such as 0.7."
            )

    def __str__(self) -> str:
        most = f"at most {self.max_new_tokens} tokens"
        if not self.temperature:
            return f"greedy (temperature 0), {most}"
        chosen = f"temperature {self.temperature:g}, top_p {self.top_p:g}, top_k {self.top_k or 'off'}"
        return f"{chosen}, seed {self.seed}, {most}"


def continue_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    pad_id: int,
    streamer: BaseStreamer | None = None,
    criteria: Sequence[StoppingCriteria] = (),
) -> list[list[int]]:
    """Continue prompts of any lengths, each until a stop token or its most tokens; the stop token is the last one.

    Nothing but ``sampling`` decides how tokens are chosen: the ``generation_config`` of the model is not read. Global
    random generators stay as they were.

    Args:
        model: The model, in eval mode.
        prompts: Token ids of each prompt, shorter than the model's context.
        sampling: How tokens are chosen.
        stop_ids: Tokens that end an answer.
        pad_id: Token that fills short prompts; it is never seen by the others.
        streamer: Is handed the tokens as they come, for a single prompt.
        criteria: Further reasons to stop.
    """
    limit = context_length(model.config)
    budgets = [min(sampling.max_new_tokens, limit - len(p)) if limit else sampling.max_new_tokens for p in prompts]
    found: list[list[int]] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _own_settings_off(model):
        torch.manual_seed(sampling.seed)
        for budget, batch in _batches(prompts, budgets, sampling.batch_size):
            config = _generation_config(sampling, budget, stop_ids, pad_id)
            options: dict[str, Any] = {"streamer": streamer} if streamer else {}
            if criteria:
                options["stopping_criteria"] = list(criteria)
            ids, mask = left_padded(batch, pad_id, model.device)
            output: Any = model.generate(ids, attention_mask=mask, generation_config=config, **options)  # pyright: ignore[reportCallIssue]
            found += [_until_stop(row, stop_ids) for row in output[:, ids.shape[1] :].tolist()]
    return found


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of token ids that end together, and a mask of what is no padding, each ``(rows, tokens)``."""
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _batches(
    prompts: Sequence[Sequence[int]], budgets: Sequence[int], size: int
) -> Iterator[tuple[int, list[Sequence[int]]]]:
    """Batches in order, each of prompts that may grow by the same number of tokens."""
    for budget, group in groupby(zip(budgets, prompts, strict=True), key=lambda pair: pair[0]):
        rows = [prompt for _, prompt in group]
        for start in range(0, len(rows), size):
            yield budget, rows[start : start + size]


def _generation_config(sampling: Sampling, budget: int, stop_ids: Sequence[int], pad_id: int) -> GenerationConfig:
    drawn: dict[str, Any] = {}
    if sampling.temperature:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=budget,
        do_sample=bool(sampling.temperature),
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=sampling.use_cache,
        **drawn,
    )


@contextmanager
def _own_settings_off(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the model has a plain ``generation_config``: transformers adds whatever is in its own."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = [number for number, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0] + 1] if ends else ids
