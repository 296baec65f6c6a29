"""FSDP2 inside an accumulation window: gradients stay with the rank that computed them until they are wanted.

The one file that touches FSDP2's private state. What is deferred is in no ``parameter.grad``: FSDP2 keeps it beside its
whole parameters, where neither ``zero_grad`` nor a checkpoint finds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def deferred_gradients(module: nn.Module) -> Iterator[None]:
    """Within the context backward passes communicate no gradients; the first one outside reduces them all."""
    _synchronise(module, False)
    try:
        yield
    finally:
        _synchronise(module, True)


def reduce_deferred(module: nn.Module) -> None:
    """Reduce deferred gradients into ``parameter.grad`` now; every rank must call this."""
    if any(True for _ in _deferred(module)):
        for child in module.modules():
            if isinstance(child, FSDPModule) and (state := _state(child))._is_root:
                # What FSDP2 does at the end of a backward pass; nothing but the reduction is left to do.
                state._root_post_backward_final_callback()


def drop_deferred(module: nn.Module) -> None:
    """Forget deferred gradients: of a window that was never closed."""
    for parameter in _deferred(module):
        parameter.unsharded_accumulated_grad = None
        parameter._unsharded_param.grad = None


def _synchronise(module: nn.Module, wanted: bool) -> None:
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.set_requires_gradient_sync(wanted, recurse=False)


def _deferred(module: nn.Module) -> Iterator[Any]:
    """FSDP2's handles of the parameters whose gradient is deferred."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            for group in _state(child)._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    # The whole parameter exists from its first use on.
                    whole = getattr(parameter, "_unsharded_param", None)
                    if whole is not None and (
                        whole.grad is not None or parameter.unsharded_accumulated_grad is not None
                    ):
                        yield parameter


def _state(module: FSDPModule) -> Any:
    return module._get_fsdp_state()
