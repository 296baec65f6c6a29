"""FSDP2 for an adapted module: one FSDP group per repeated block, and one for the rest."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lightning_lora.errors import StrategyError

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def shard_lora(module: nn.Module, mesh: DeviceMesh, block_types: Sequence[type[nn.Module]] | None = None) -> nn.Module:
    """Shard ``module`` over the data-parallel dimension of ``mesh``; call it in ``configure_model`` after `apply_lora`.

    FSDP2 shards each parameter separately, so frozen weights and adapters may share a group. A module that is already
    sharded is left unchanged, because Lightning calls ``configure_model`` again for every stage. A LightningModule may
    be sharded itself: its steps then count as forward passes.

    Args:
        module: The adapted module, with real weights.
        mesh: The device mesh of the strategy, or its data-parallel part.
        block_types: Types of the modules that form one group each. None: all members of every outermost
            ``nn.ModuleList`` that holds two or more modules of the same type.

    Returns:
        The module itself.

    Raises:
        ConfigError: If ``block_types`` are given and the module holds no such module.
    """
    if isinstance(module, FSDPModule):
        return module
    if "data_parallel" in (mesh.mesh_dim_names or ()):
        mesh = mesh["data_parallel"]
    for block in repeated_blocks(module, block_types):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if isinstance(module, LightningModule):
        # Lightning calls them instead of `forward`, and FSDP2 gathers the parameters of a module for its forward only.
        for step in _STEPS:
            if is_overridden(step, module):
                register_fsdp_forward_method(module, step)
    return module


def repeated_blocks(module: nn.Module, block_types: Sequence[type[nn.Module]] | None = None) -> list[nn.Module]:
    """Modules that form one group each, as in `shard_lora`; empty if no list holds modules of the same type."""
    if block_types is not None:
        blocks = [child for child in module.modules() if isinstance(child, tuple(block_types))]
        if not blocks:
            kinds = ", ".join(kind.__name__ for kind in block_types)
            raise StrategyError(
                f"{type(module).__name__} holds no {kinds}: give block_types that occur in it, or None."
            )
        return blocks
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(child, nn.ModuleList) and not inside and len(child) > 1 and len({type(c) for c in child}) == 1:
            lists.append((name, child))
    return [block for _, blocks in lists for block in blocks]
