"""FSDP1's flat parameters: each process holds a piece of a unit, and the parameters are views of it, often empty."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_lora.errors import AlreadyShardedError
from lightning_lora.layers.walk import factor_parameters


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
