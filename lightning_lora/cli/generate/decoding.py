"""Token ids to the token ids that a model continues them with, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_lora.errors import GenerateError, check_count
from lightning_lora.tasks.loading import context_length
from lightning_lora.tasks.rl.sampling.decoding import decode
from lightning_lora.tasks.rl.sampling.samples import SamplingSettings
from lightning_lora.tasks.rl.sampling.stop_texts import StopTexts

if TYPE_CHECKING:  # the module imports torchao, bitsandbytes and peft
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sampling(SamplingSettings):
    """How tokens are chosen: as `SamplingSettings` says, by default the most probable ones.

    Args:
        seed: Seeds the draws.
        batch_size: Prompts that are answered together.
        use_cache: Whether keys and values of earlier tokens are kept.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 8
    use_cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("batch_size", self.batch_size, GenerateError)
        check_count("seed", self.seed, GenerateError, least=0)
        if self.seed >= 2**63:
            raise GenerateError(f"seed must be below 2**63, got {self.seed}.")
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise GenerateError(
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
    stop_texts: StopTexts | None = None,
    on_tokens: Callable[[Tensor], bool] | None = None,
) -> list[tuple[list[int], bool]]:
    """Continue prompts of any lengths, each until a stop token, a stop text or its most tokens; each stays at the end.

    Nothing but ``sampling`` decides how tokens are chosen: the ``generation_config`` of the model is not read. Global
    random generators stay as they were.

    Args:
        model: The model, in eval mode.
        prompts: Token ids of each prompt, shorter than the model's context.
        sampling: How tokens are chosen.
        stop_ids: Tokens that end an answer.
        stop_texts: Finds the texts that end an answer.
        on_tokens: Called with the tokens as they come, for a single prompt; if it returns True, the answer ends.

    Returns:
        For each prompt the new tokens, and whether they ended by a stop token or text.
    """
    found: list[tuple[list[int], bool]] = []
    generator = torch.Generator().manual_seed(sampling.seed)
    for start in range(0, len(prompts), sampling.batch_size):
        samples = decode(
            model,
            [torch.tensor(prompt) for prompt in prompts[start : start + sampling.batch_size]],
            1,
            sampling,
            generator,
            stop_ids,
            limit=context_length(model.config),
            stop_texts=stop_texts,
            use_cache=sampling.use_cache,
            on_tokens=on_tokens,
        )
        rows = zip(samples.tokens.tolist(), samples.lengths.tolist(), samples.finished.tolist(), strict=True)
        found += [(ids[:length], finished) for ids, length, finished in rows]
    return found
