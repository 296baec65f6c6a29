"""FSDP1 as Lightning has it, for full fine-tuning; for adapters FSDP2 (`lightning_lora.sharding`) costs less."""

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
    """``FSDPStrategy`` with one unit per repeated block, one for each trained layer beside them, and one for the rest.

    Blocks are those that `lightning_lora.sharding.shard_lora` finds. Trained layers are set apart where others are
    frozen. ``fit`` and then ``test`` of one Trainer use the same units. A checkpoint of one file is verified, and
    refused if it holds other than plain types, before it is read: ``FSDPStrategy`` unpickles it, whatever
    ``weights_only`` says.

    A unit that holds a trained parameter has a gradient for all of its parameters, frozen ones too. With adapters in
    every block that is a gradient as large as the blocks, divided by the number of ranks; under FSDP2 only the
    adapters have any.

    Args:
        args: As in ``FSDPStrategy``.
        kwargs: As in ``FSDPStrategy``; ``auto_wrap_policy`` in place of the blocks.
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
        """Verify a file first."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_file():
            if remark := whole_checkpoint(path, fall_back=False).remark:
                rank_zero_info(remark)
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return super().load_checkpoint(path, weights_only)


def _units(model: nn.Module) -> set[nn.Module]:
    """The modules that become a unit each."""
    blocks = repeated_blocks(model)
    if not blocks:
        rank_zero_warn(
            f"{type(model).__name__} has no list of like blocks: most of it is one FSDP unit, gathered at once. Give "
            "the strategy an auto_wrap_policy."
        )
    inside = {module for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if module not in inside]
    if all(parameter.requires_grad for module in outside for parameter in module.parameters(recurse=False)):
        return set(blocks)
    # A parameter that two modules share must stay in the unit around both.
    holders = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {*blocks, *(module for module in outside if module is not model and _is_trained_alone(module, holders))}


def _is_trained_alone(module: nn.Module, holders: Mapping[int, int]) -> bool:
    own = list(module.parameters(recurse=False))
    return any(p.requires_grad for p in own) and all(holders[id(p)] == 1 for p in own) and not any(module.children())


def clip_gradient_norm(module: LightningModule, max_norm: float) -> bool:
    """Clip as ``gradient_clip_val`` asks where Lightning refuses to: under FSDP1, whose units know only their parts.

    Args:
        module: In a run.
        max_norm: Largest 2-norm of all gradients of all ranks together.

    Returns:
        Whether ``module`` is under FSDP1; elsewhere nothing is done.
    """
    model = module.trainer.strategy.model
    if not isinstance(model, FullyShardedDataParallel):
        return False
    model.clip_grad_norm_(max_norm)
    return True
