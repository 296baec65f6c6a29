"""The sampler that runs the model that is trained, adapters on, in the process that trains it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedTokenizerBase

from lightning_lora.errors import ConfigError
from lightning_lora.lora.evaluation_mode import in_eval_mode
from lightning_lora.tasks.end_of_turn import end_ids, stopping_ids
from lightning_lora.tasks.loading import context_length

from .decoding import decode
from .samples import Samples, SamplingSettings
from .stop_texts import StopTexts


class InProcessSampler:
    """Draws completions from the model that is trained, as it is at the moment, without a copy of it.

    Dropout is off while it draws, and every layer is put back into its own mode afterwards. Under FSDP all processes
    must call it together, with at least one prompt each; their prompts and completions may differ in number and length.

    Args:
        tokenizer: Finds the tokens that end an answer, and stop texts. None: the model's ``generation_config`` alone
            says where a completion ends.
        stop_ids: Further tokens that end a completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, stop_ids: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop_ids = tokenizer, tuple(stop_ids)
        self._model: nn.Module | None = None
        self._version = 0

    def load(self, model: nn.Module, version: int) -> None:
        """Take the present weights: they are those of ``model``, a causal language model of transformers."""
        self._model, self._version = model, version

    def sample(
        self, prompts: list[Tensor], group_size: int, settings: SamplingSettings, generator: torch.Generator
    ) -> Samples:
        """Draw ``group_size`` completions of each prompt, which are tokens ``(length,)`` without padding.

        Raises:
            ConfigError: If no model was loaded, stop texts are asked for without a tokenizer, or a prompt is empty or
                leaves no room in the model's context.
        """
        model = self._model
        if model is None:
            raise ConfigError("the sampler has no model: call load first.")
        if settings.stop and self.tokenizer is None:
            raise ConfigError("stop texts need a tokenizer: give one to InProcessSampler.")
        limit = context_length(model.config)  # type: ignore[arg-type]
        _check_lengths(prompts, limit)
        found = stopping_ids(getattr(model, "generation_config", None), self.stop_ids)
        ends = [] if self.tokenizer is None else [self.tokenizer.eos_token_id, *end_ids(self.tokenizer)]
        stops = [token for token in dict.fromkeys([*found, *ends]) if isinstance(token, int)]
        texts = StopTexts(self.tokenizer, settings.stop) if settings.stop and self.tokenizer else None
        in_step = _is_sharded(model)
        with in_eval_mode(model):
            samples = decode(
                model,
                prompts,
                group_size,
                settings,
                generator,
                stops,
                limit=limit,
                stop_texts=texts,
                in_step=in_step,
            )
        return dataclasses.replace(samples, version=self._version)


def _check_lengths(prompts: Sequence[Tensor], limit: int | None) -> None:
    if not prompts:
        raise ConfigError("there are no prompts to sample from.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"prompt {number} of the batch has no tokens.")
        if limit is not None and len(prompt) >= limit:
            raise ConfigError(
                f"prompt {number} of the batch has {len(prompt)} tokens, and the context of the model is {limit}: "
                "leave out such prompts."
            )


def _is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass gathers weights of other processes."""
    kinds = (FSDPModule, FullyShardedDataParallel)
    return dist.is_initialized() and any(isinstance(module, kinds) for module in model.modules())
