"""One base in memory for all arms: frozen weights that are equal bit for bit are stored once.

Each arm has parameters of its own, so that one may freeze what another trains, but frozen ones have their values in the
same place. Buffers, such as running means, stay apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_SAMPLE = 64
"""Values of each weight that are looked at to see whether it has changed."""


class SharedBase:
    """Weights that arms have in common."""

    def __init__(self) -> None:
        self._weights: dict[Any, Tensor] = {}
        self._samples: dict[Any, Tensor] = {}
        self._loaded: dict[Any, nn.Module] = {}

    def load(self, key: Any, load: Callable[[], nn.Module], device: torch.device) -> nn.Module:
        """A base that is loaded once; each call returns modules of its own around the same values.

        Args:
            key: What is loaded, such as name and type.
            device: Where it is needed, so that it is not moved, and stored again, for each arm.
        """
        if key not in self._loaded:
            self._loaded[key] = load().to(device)
        return _with_same_values(self._loaded[key])

    def share(self, module: nn.Module) -> None:
        """Store frozen weights of an arm where those of earlier arms are, and trained ones apart from them."""
        places = {storage_of(weight) for weight in self._weights.values()}
        places |= {storage_of(weight) for base in self._loaded.values() for weight in base.parameters()}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                if storage_of(parameter) in places:
                    parameter.data = parameter.data.clone()
                continue
            if type(parameter) is not nn.Parameter or parameter.is_meta:
                continue  # a quantised weight is shared as the object that it is, by `load`
            key = name, parameter.dtype, tuple(parameter.shape), parameter.device
            known = self._weights.setdefault(key, parameter.data)
            if known.data_ptr() != parameter.data_ptr() and torch.equal(known, parameter.data):
                parameter.data = known
                self._samples.setdefault(key, _sample(known))

    def changed(self) -> str:
        """The name of a frozen weight that an arm has changed, as a teacher that follows its student is; "" if none."""
        return next(
            (key[0] for key, was in self._samples.items() if not torch.equal(_sample(self._weights[key]), was)), ""
        )


def storage_of(tensor: Tensor) -> int:
    """The address of the memory that a tensor is in; for a tensor made of several, which one it is."""
    return id(tensor) if is_traceable_wrapper_subclass(tensor) else tensor.untyped_storage().data_ptr()


def _sample(weight: Tensor) -> Tensor:
    values = weight.reshape(-1)  # a view of what is contiguous
    return values[:: max(1, len(values) // _SAMPLE)].clone().view(torch.uint8)  # bits: NaN is equal to itself


def _with_same_values(base: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in base.parameters():
        # The layer of an int8 weight takes the scales (SCB) off it at the first call.
        if type(parameter) is not nn.Parameter and "SCB" not in vars(parameter):
            memo[id(parameter)] = parameter  # a quantised weight is only read, and its class has its own constructor
            continue
        kind: Any = type(parameter)
        memo[id(parameter)] = made = kind._make_subclass(kind, parameter.data, parameter.requires_grad)
        vars(made).update(vars(parameter))  # transformers marks weights that come from a file
    return copy.deepcopy(base, memo)
