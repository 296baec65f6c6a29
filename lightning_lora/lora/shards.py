"""Local shard, full value and single entries of a sharded tensor: DTensor (FSDP2), flat parameters (FSDP1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_lora.errors import AlreadyShardedError
from lightning_lora.lora.layers.adapted import factor_parameters


def local_part(tensor: Tensor) -> Tensor:
    """The part that this process holds; of a tensor that is not in shards the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole without gradient; of a tensor in shards all ranks must ask."""
    if is_flat(tensor):
        # The memory behind a flat parameter is given back.
        return tensor.detach().clone()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def reshard(module: nn.Module) -> None:
    """Give every FSDP2 parameter back its shard.

    After a forward without gradients the outermost parameters stay whole: other objects than the optimizer's, in
    memory that FSDP2 will free and nobody else may hold on to.
    """
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def is_flat(parameter: Tensor) -> bool:
    """Whether FSDP1 keeps ``parameter`` as a view of a flat one: of other shape, and of a part of the values."""
    return getattr(parameter, "_fsdp_flattened", False)


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Within, parameters that FSDP1 has flattened are whole, for reading; a collective. Others are as they were.

    Every process then holds the whole of ``module``, in the memory of the CPU where it trains on another device.

    Args:
        module: The outermost FSDP1 wrapper (``trainer.model``): parameters outside of all inner ones are its own.
    """
    units = [child for child in module.modules() if isinstance(child, FullyShardedDataParallel)]
    # A second context inside of the first is an error of torch's.
    if not units or any(unit.training_state.name == "SUMMON_FULL_PARAMS" for unit in units):
        yield
        return
    device = units[0].compute_device
    is_elsewhere = device is not None and device.type != "cpu"
    with (
        FullyShardedDataParallel.summon_full_params(module, writeback=False, offload_to_cpu=is_elsewhere),
        torch.no_grad(),
    ):
        yield


def check_whole(module: nn.Module, action: str) -> None:
    """Raise `AlreadyShardedError` if a factor of ``module`` is in pieces and its values cannot be read."""
    # A factor has two axes at least, a piece of a flat parameter one.
    pieces = [name for name, factor in factor_parameters(module).items() if is_flat(factor) and factor.dim() < 2]
    if pieces:
        raise AlreadyShardedError(
            f"cannot {action}: FSDP1 has flattened {len(pieces)} factors ({pieces[0]}, ...), and only its outermost "
            "wrapper can put them together. Give trainer.model instead of the module (on every rank), or use "
            "AdapterCheckpoint."
        )


def every_nth(tensor: DTensor, step: int) -> Tensor | None:
    """``tensor.full_tensor().reshape(-1)[::step]``, where ranks exchange no more than that. All of them must call.

    Args:
        tensor: Of any type and shape.
        step: Distance of the entries in the whole tensor.

    Returns:
        The entries, on every rank and its device; None, on every rank alike, where the parts are no plain blocks:
        summands, strides of two meshes along one dimension, tensors of a type of their own.
    """
    local, mesh, offsets = tensor.to_local().detach(), tensor.device_mesh, _offsets(tensor)
    if offsets is None or type(local) not in (Tensor, torch.nn.Parameter):
        return None
    places = torch.arange(0, tensor.numel(), step, device=local.device)
    indices = list(torch.unravel_index(places, tensor.shape)) if tensor.ndim else []
    indices = [index - offset for index, offset in zip(indices, offsets, strict=True)]
    inside = torch.full_like(places, _is_first(mesh, tensor), dtype=torch.bool)
    for index, size in zip(indices, local.shape, strict=True):
        inside &= (index >= 0) & (index < size)
    entries = local.new_zeros(len(places))
    # Where there is one, an index into a scalar is no index at all.
    entries[inside] = local[tuple(index[inside] for index in indices)] if indices else local
    # Every entry is some rank's and zero at the others, so that the sum of the bytes is the bytes.
    as_bytes = entries.view(torch.uint8)
    for dimension in range(mesh.ndim):
        dist.all_reduce(as_bytes, group=mesh.get_group(dimension))
    return entries


def _offsets(tensor: DTensor) -> list[int] | None:
    """Where this rank's block begins, for each dimension; None where it is no block."""
    coordinate = tensor.device_mesh.get_coordinate()
    sharded = [place.dim for place in tensor.placements if type(place) is Shard]
    is_block = all(type(place) in (Shard, Replicate) for place in tensor.placements)
    if coordinate is None or not is_block or len(set(sharded)) < len(sharded):
        return None
    offsets = [0] * tensor.ndim
    for place, rank, num_ranks in zip(tensor.placements, coordinate, tensor.device_mesh.shape, strict=True):
        if isinstance(place, Shard):
            # As torch.chunk cuts: all blocks are of one size but the last ones.
            offsets[place.dim] = rank * -(-tensor.shape[place.dim] // num_ranks)
    return offsets


def _is_first(mesh: DeviceMesh, tensor: DTensor) -> bool:
    """Whether this rank speaks for those that hold the same block."""
    coordinate = mesh.get_coordinate() or []
    return all(
        rank == 0 for rank, place in zip(coordinate, tensor.placements, strict=True) if isinstance(place, Replicate)
    )
