"""A few entries of a tensor that is sharded over several ranks, without putting it together anywhere."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


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
