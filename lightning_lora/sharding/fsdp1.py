"""FSDP1 on top of Lightning's strategy, for full fine-tuning; for adapters FSDP2 (`fsdp2`) needs less memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy
from typing_extensions import override

from lightning_lora.files.whole_checkpoint import whole_checkpoint
from lightning_lora.sharding.shard import repeated_blocks


class BlockwiseFSDPStrategy(FSDPStrategy):
    """``FSDPStrategy`` with one unit per repeated block, one per trained layer outside them, and one for the rest.

    `lightning_lora.sharding.shard_lora` finds the same blocks. Trained layers get their own units only if some layers
    outside the blocks are frozen. ``fit`` and a later ``test`` of the same Trainer use the same units. A checkpoint in
    one file is verified before it is read, and refused if it holds anything but plain types, because ``FSDPStrategy``
    unpickles it even under ``weights_only``.

    A unit with a trained parameter allocates a gradient for all of its parameters, including frozen ones. With adapters
    in every block that gradient is as large as the blocks divided by the number of ranks; under FSDP2 only the adapters
    have gradients.

    Args:
        args: Arguments of ``FSDPStrategy``.
        kwargs: Arguments of ``FSDPStrategy``; ``auto_wrap_policy`` replaces the units described above.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._wrapped: nn.Module | None = None

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self._wrapped is not None and self._wrapped.module is model:
            return self._wrapped
        is_wrapped = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        is_own = "auto_wrap_policy" not in self.kwargs and not is_wrapped
        if is_own:
            units = _units(model)
            self.kwargs["auto_wrap_policy"] = CustomPolicy(lambda module: module in units)
        try:
            self._wrapped = super()._setup_model(model)
        finally:
            if is_own:
                del self.kwargs["auto_wrap_policy"]
        return self._wrapped

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Verify a checkpoint in one file before ``FSDPStrategy`` reads it."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_file():
            if remark := whole_checkpoint(path, fall_back=False).remark:
                rank_zero_info(remark)
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return super().load_checkpoint(path, weights_only)


def _units(model: nn.Module) -> set[nn.Module]:
    """Modules of ``model`` that become a unit each."""
    blocks = repeated_blocks(model)
    if not blocks:
        rank_zero_warn(
            f"{type(model).__name__} has no ModuleList of repeated blocks: most of it is one FSDP unit, which is "
            "gathered at once. Give the strategy an auto_wrap_policy."
        )
    inside = {module for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if module not in inside]
    if all(parameter.requires_grad for module in outside for parameter in module.parameters(recurse=False)):
        return set(blocks)
    # A parameter that two modules share must stay in the unit that holds both.
    holders = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {*blocks, *(module for module in outside if module is not model and _is_trained_alone(module, holders))}


def _is_trained_alone(module: nn.Module, holders: Mapping[int, int]) -> bool:
    own = list(module.parameters(recurse=False))
    return any(p.requires_grad for p in own) and all(holders[id(p)] == 1 for p in own) and not any(module.children())


def clip_gradient_norm(module: LightningModule, max_norm: float) -> bool:
    """Clip gradients by their norm over all ranks under FSDP1, where Lightning refuses ``gradient_clip_val``.

    Args:
        module: The module in training.
        max_norm: Largest allowed 2-norm of all gradients of all ranks together.

    Returns:
        True under FSDP1; under other strategies nothing is done and the result is False.
    """
    model = module.trainer.strategy.model
    if not isinstance(model, FullyShardedDataParallel):
        return False
    model.clip_grad_norm_(max_norm)
    return True
