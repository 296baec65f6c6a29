"""Sharded tensors: the local shard, the full value, and evenly spaced elements.

FSDP2 and tensor parallelism shard every parameter by itself, as a ``DTensor``. FSDP1 flattens the parameters of a
wrapper into one and shards that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.errors import AlreadyShardedError
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.lora.layers.base import MAGNITUDE

if TYPE_CHECKING:  # each takes a second to import, which merging on disk does without
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a ``DTensor``; nothing is imported to find out."""
    return _is_instance(tensor, "torch.distributed.tensor", "DTensor")


def local_shard(tensor: Tensor) -> Tensor:
    """The shard of ``tensor`` on this rank, or ``tensor`` itself if it is not sharded."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full value of ``tensor``, without gradient. A collective if ``tensor`` is sharded."""
    if is_flattened(tensor):
        # FSDP1 frees the memory behind a flattened parameter.
        return tensor.detach().clone()
    return (tensor.full_tensor() if is_dtensor(tensor) else tensor).detach()


def reshard(module: nn.Module) -> None:
    """Give every FSDP2 parameter its shard back.

    After a forward pass without gradients the outermost parameters stay unsharded. They are then other objects than
    the optimizer's, in memory that FSDP2 will free.
    """
    for child in module.modules():
        if _is_fsdp2(child):
            child.reshard()


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 keeps ``parameter`` as a view of a flat one, with another shape and only some of the values."""
    return getattr(parameter, "_fsdp_flattened", False)


@contextmanager
def full_parameters(module: nn.Module) -> Iterator[None]:
    """Within the context, parameters that FSDP1 has flattened have their full value, for reading only.

    A collective. Every rank then holds all of ``module``, in CPU memory where it trains on another device. Without
    FSDP1 nothing happens.

    Args:
        module: The outermost FSDP1 wrapper (``trainer.model``), which owns the parameters outside all inner wrappers.
    """
    wrappers = [child for child in module.modules() if _is_fsdp1(child)]
    # torch raises an error if this context is entered twice.
    if not wrappers or any(wrapper.training_state.name == "SUMMON_FULL_PARAMS" for wrapper in wrappers):
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    device = wrappers[0].compute_device
    to_cpu = device is not None and device.type != "cpu"
    with (
        FullyShardedDataParallel.summon_full_params(module, writeback=False, offload_to_cpu=to_cpu),
        torch.no_grad(),
    ):
        yield


def check_not_flattened(module: nn.Module, action: str) -> None:
    """Raise `AlreadyShardedError` if FSDP1 has flattened a factor of ``module``, so that it cannot be read."""
    # A factor has at least two axes, a shard of a flat parameter one; a magnitude has one too.
    factors = {name: factor for name, factor in factor_parameters(module).items() if not name.endswith(MAGNITUDE)}
    shards = [name for name, factor in factors.items() if is_flattened(factor) and factor.dim() < 2]
    if shards:
        raise AlreadyShardedError(
            f"cannot {action}: FSDP1 has flattened {len(shards)} factors ({shards[0]}, ...), and only its outermost "
            "wrapper can put them together. Give trainer.model instead of the module (on every rank), or use "
            "AdapterCheckpoint."
        )


def every_nth(tensor: DTensor, step: int) -> Tensor | None:
    """``tensor.full_tensor().reshape(-1)[::step]``, where ranks exchange only these elements. A collective.

    Returns:
        The elements, on every rank and its device. None on every rank if the shards are not plain blocks: partial
        sums, two mesh dimensions along one axis, or tensors of a special type.
    """
    local, offsets = tensor.to_local().detach(), _block_offsets(tensor)
    if offsets is None or type(local) not in (Tensor, torch.nn.Parameter):
        return None
    positions = torch.arange(0, tensor.numel(), step, device=local.device)
    indices = list(torch.unravel_index(positions, tensor.shape)) if tensor.ndim else []
    indices = [index - offset for index, offset in zip(indices, offsets, strict=True)]
    is_local = torch.full_like(positions, _is_first_replica(tensor), dtype=torch.bool)
    for index, size in zip(indices, local.shape, strict=True):
        is_local &= (index >= 0) & (index < size)
    elements = local.new_zeros(len(positions))
    # A scalar has no index.
    elements[is_local] = local[tuple(index[is_local] for index in indices)] if indices else local
    # One rank holds each element and the others zero, so the sum of the bytes is its bytes.
    as_bytes = elements.view(torch.uint8)
    for dimension in range(tensor.device_mesh.ndim):
        dist.all_reduce(as_bytes, group=tensor.device_mesh.get_group(dimension))
    return elements


def _block_offsets(tensor: DTensor) -> list[int] | None:
    """The first index of this rank's block along every axis; None if its shard is not one plain block."""
    from torch.distributed.tensor import Replicate, Shard

    coordinate = tensor.device_mesh.get_coordinate()
    axes = [placement.dim for placement in tensor.placements if type(placement) is Shard]
    is_block = all(type(placement) in (Shard, Replicate) for placement in tensor.placements)
    if coordinate is None or not is_block or len(set(axes)) < len(axes):
        return None
    offsets = [0] * tensor.ndim
    for placement, rank, num_ranks in zip(tensor.placements, coordinate, tensor.device_mesh.shape, strict=True):
        if isinstance(placement, Shard):
            # As torch.chunk splits: all blocks have one size, except the last ones.
            offsets[placement.dim] = rank * -(-tensor.shape[placement.dim] // num_ranks)
    return offsets


def _is_first_replica(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same block."""
    from torch.distributed.tensor import Replicate

    coordinate = tensor.device_mesh.get_coordinate() or []
    replicated = (isinstance(placement, Replicate) for placement in tensor.placements)
    return all(rank == 0 for rank, is_replica in zip(coordinate, replicated, strict=True) if is_replica)


def _is_fsdp1(module: nn.Module) -> TypeGuard[FullyShardedDataParallel]:
    return _is_instance(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def _is_fsdp2(module: nn.Module) -> TypeGuard[FSDPModule]:
    return _is_instance(module, "torch.distributed.fsdp", "FSDPModule")


def _is_instance(value: object, module: str, name: str) -> bool:
    loaded = sys.modules.get(module)  # a class that was never imported has no instances
    return loaded is not None and isinstance(value, getattr(loaded, name))


def check_not_sharded(module: nn.Module) -> None:
    """Raise `AlreadyShardedError` if a parameter of ``module`` is sharded."""
    for name, parameter in module.named_parameters():
        if is_dtensor(parameter) or type(parameter).__name__ == "FlatParameter" or is_flattened(parameter):
            raise AlreadyShardedError(
                f"{name!r} is sharded already, and an adapter added now would differ between ranks. Call "
                f"self.apply_lora() (or inject_lora) in configure_model before sharding the module."
            )
