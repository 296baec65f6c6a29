"""The sampler that runs the model that is trained, adapters on, in the process that trains it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedTokenizerBase

from lightning_lora.errors import SamplingSettingError
from lightning_lora.lora.evaluation_mode import in_eval_mode
from lightning_lora.lora.shards import is_dtensor, reshard
from lightning_lora.tasks.end_of_turn import end_ids, stopping_ids
from lightning_lora.tasks.loading import context_length
from lightning_lora.tasks.rl.sampling.decoding import decode
from lightning_lora.tasks.rl.sampling.samples import Samples, SamplingSettings
from lightning_lora.tasks.rl.sampling.stop_texts import StopTexts


class InProcessSampler:
    """Draws completions from the model that is trained, as it is at the moment, without a copy of it.

    Dropout is off while it draws, and every layer is put back into its own mode afterwards. Under FSDP all processes
    must call it together, with at least one prompt each; their prompts and completions may differ in number and length.
    Under FSDP2 the outermost module is left as ``fully_shard`` leaves it by default: it alone keeps its weights after
    a forward pass.

    Args:
        tokenizer: Finds the tokens that end an answer, and stop texts. None: the model's ``generation_config`` alone
            says where a completion ends.
        stop_ids: Further tokens that end a completion.
        gather_once: Whether FSDP2 gathers the weights once for all tokens, so that every process holds the whole model
            while it draws, without the optimizer's state. Otherwise it gathers each layer anew for each token, which is
            far slower, for a model that fits into no device.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stop_ids: Sequence[int] = (),
        gather_once: bool = True,
    ) -> None:
        self.tokenizer, self.stop_ids, self.gather_once = tokenizer, tuple(stop_ids), gather_once
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
            raise SamplingSettingError("the sampler has no model: call load first.")
        if settings.stop and self.tokenizer is None:
            raise SamplingSettingError("stop texts need a tokenizer: give one to InProcessSampler.")
        limit = context_length(model.config)  # type: ignore[arg-type]
        _check_lengths(prompts, limit)
        found = stopping_ids(getattr(model, "generation_config", None), self.stop_ids)
        ends = [] if self.tokenizer is None else [self.tokenizer.eos_token_id, *end_ids(self.tokenizer)]
        stops = [token for token in dict.fromkeys([*found, *ends]) if isinstance(token, int)]
        texts = StopTexts(self.tokenizer, settings.stop) if settings.stop and self.tokenizer else None
        is_kept = self.gather_once and _can_keep_weights(model)
        with in_eval_mode(model), _weights_kept(model) if is_kept else nullcontext():
            samples = decode(
                model,
                prompts,
                group_size,
                settings,
                generator,
                stops,
                limit=limit,
                stop_texts=texts,
                in_step=_is_sharded(model) and not is_kept,
            )
        return dataclasses.replace(samples, version=self._version)


def _check_lengths(prompts: Sequence[Tensor], limit: int | None) -> None:
    if not prompts:
        raise SamplingSettingError("there are no prompts to sample from.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise SamplingSettingError(f"prompt {number} of the batch has no tokens.")
        if limit is not None and len(prompt) >= limit:
            raise SamplingSettingError(
                f"prompt {number} of the batch has {len(prompt)} tokens, and the context of the model is {limit}: "
                "leave out such prompts."
            )


def _is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass gathers weights of other processes."""
    kinds = (FSDPModule, FullyShardedDataParallel)
    return dist.is_initialized() and any(isinstance(module, kinds) for module in model.modules())


def _can_keep_weights(model: nn.Module) -> bool:
    """Whether FSDP2 alone shards the model: then a forward pass needs no other process once it has all weights."""
    shards = [parameter for parameter in model.parameters() if is_dtensor(parameter)]
    return isinstance(model, FSDPModule) and all(shard.device_mesh.ndim == 1 for shard in shards)


@contextmanager
def _weights_kept(model: nn.Module) -> Iterator[None]:
    """Within the block FSDP2 keeps the weights that it gathers for the first forward pass."""
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_forward(False)
    try:
        yield
    finally:
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)
        reshard(model)
