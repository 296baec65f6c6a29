"""This process's part of a tensor that is in shards, and the whole of it."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lora.flat_parameters import is_flat


def local_part(tensor: Tensor) -> Tensor:
    """The part that this process holds; of a tensor that is not in shards the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole without gradient; of a tensor in shards all ranks must ask."""
    if is_flat(tensor):
        # The memory behind a flat parameter is given back.
        return tensor.detach().clone()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
