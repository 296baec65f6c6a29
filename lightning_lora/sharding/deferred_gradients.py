"""Deferred gradients: under FSDP2 each rank keeps its own gradients until the end of an accumulation window.

This is the only file that uses private state of FSDP2. A deferred gradient is not in ``parameter.grad``: FSDP2 keeps it
beside the unsharded parameter, where neither ``zero_grad`` nor a checkpoint finds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def deferred_gradients(module: nn.Module) -> Iterator[None]:
    """Inside this context backward passes do not communicate gradients; the first one after it reduces them all."""
    _set_gradient_sync(module, False)
    try:
        yield
    finally:
        _set_gradient_sync(module, True)


def reduce_deferred(module: nn.Module) -> None:
    """Reduce deferred gradients into ``parameter.grad`` now; every rank must call it."""
    if any(True for _ in _deferred(module)):
        for child in module.modules():
            if isinstance(child, FSDPModule) and (state := _state(child))._is_root:
                # FSDP2 calls this at the end of a backward pass; here only the reduction is left to do.
                state._root_post_backward_final_callback()


def drop_deferred(module: nn.Module) -> None:
    """Delete deferred gradients, which remain if a run ends within an accumulation window."""
    for parameter in _deferred(module):
        parameter.unsharded_accumulated_grad = None
        parameter._unsharded_param.grad = None


def _set_gradient_sync(module: nn.Module, is_on: bool) -> None:
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.set_requires_gradient_sync(is_on, recurse=False)


def _deferred(module: nn.Module) -> Iterator[Any]:
    """FSDP2's handles of all parameters with a deferred gradient."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            for group in _parameter_groups(child):
                for parameter in group.fsdp_params:
                    # The unsharded parameter exists from its first use on.
                    whole = getattr(parameter, "_unsharded_param", None)
                    if whole is not None and (
                        whole.grad is not None or parameter.unsharded_accumulated_grad is not None
                    ):
                        yield parameter


def _parameter_groups(module: FSDPModule) -> list[Any]:
    state = _state(module)
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    # Up to torch 2.11 a module has one group at most.
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _state(module: FSDPModule) -> Any:
    return module._get_fsdp_state()
