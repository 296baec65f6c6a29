"""Digests of base weights: is this the model the adapter was trained on, and did training leave it unchanged?

One checkpoint is loaded in many types. A digest rounds to bfloat16, so it is the same in bfloat16, float32 and float64.
In float16 it may not be: float16 has fewer exponents than bfloat16, so small weights of a bfloat16 checkpoint lose
digits there, and a weight of a float32 checkpoint that is rounded to float16 and then to bfloat16 may end one step away
from the same weight rounded once. A `WeightPrint` therefore also keeps a few values, which must then agree to within
the rounding of the two types. A base that was trained further, by a percent or less, is still another base: every value
that is kept may differ by half a step of its type, 0.4 % at most in bfloat16 and 0.05 % in float16.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.quantised_weights import stored_parts
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.shards import every_nth, is_dtensor

SAMPLE = 65_536
"""The most elements of a tensor that a digest reads."""
NUM_VALUES = 32
"""The most values of a tensor that a `WeightPrint` keeps."""

# Bits of precision, and the exponent of half the smallest step.
_STEPS = {"bfloat16": (8, -134), "float16": (11, -25)}
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class WeightPrint:
    """What tells whether two tensors are the same weight, even if they were loaded in different types.

    Args:
        dtype: Type that the tensor has: ``bfloat16``, ``float16``, ...
        values: At most 32 evenly spaced values, to six digits; empty if the tensor is quantised or no numbers.
    """

    digest: str
    shape: tuple[int, ...]
    dtype: str
    values: tuple[float, ...]

    def agrees(self, other: WeightPrint) -> bool:
        """Whether both are the same weight: equal digests, or in float16 and another type equal but for rounding."""
        if self.digest == other.digest:
            return True
        types = {self.dtype, other.dtype}
        if len(types) == 1 or "float16" not in types or not self.values:
            return False
        same = self.shape == other.shape and len(self.values) == len(other.values)
        return same and all(
            abs(one - two) <= _rounding(max(abs(one), abs(two)), types)
            for one, two in zip(self.values, other.values, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types."""
        return vars(self) | {"shape": list(self.shape), "values": list(self.values)}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> WeightPrint:
        """The print that `to_dict` has written."""
        return cls(entry["digest"], tuple(entry["shape"]), entry["dtype"], tuple(entry["values"]))


def _rounding(size: float, types: Iterable[str]) -> float:
    """The most that a value of this size moves by rounding once to each of the types, and to six digits."""
    exponent = math.frexp(size)[1]
    steps = (_STEPS[name] for name in types if name in _STEPS)
    return size * 1e-5 + sum(2.0 ** max(exponent - bits - 1, least) for bits, least in steps)


def weight_print(tensor: Tensor) -> WeightPrint:
    """The print of a tensor with memory. If it is sharded, every rank must call this and gets that of the full one."""
    return _print(tuple(tensor.shape), str(tensor.dtype), _samples(tensor))


def _print(shape: tuple[int, ...], dtype: str, samples: list[Tensor]) -> WeightPrint:
    digest = _digest(torch.Size(shape), [_rounded(sample) for sample in samples])
    return WeightPrint(digest, shape, dtype.removeprefix("torch."), _values(samples))


def _values(samples: list[Tensor]) -> tuple[float, ...]:
    if len(samples) != 1 or not samples[0].is_floating_point() or not len(samples[0]):
        return ()
    numbers = torch.linspace(0, len(samples[0]) - 1, min(len(samples[0]), NUM_VALUES), dtype=torch.float64).long()
    values = samples[0][numbers.to(samples[0].device)].double()
    # JSON has no infinity.
    return tuple(float(f"{value:.6g}") for value in values.tolist()) if bool(values.isfinite().all()) else ()


def tensor_digest(tensor: Tensor, exact: bool = False) -> str:
    """A digest of shape and values, 16 hexadecimal digits.

    At most 65,536 evenly spaced elements are read (and exchanged between ranks, if the tensor is sharded), so that a
    70B model takes seconds. The digest of a quantised weight reads its codes and scales as they are stored.

    Args:
        tensor: Any tensor with memory. If it is sharded, every rank must call this and gets the digest of the full
            tensor.
        exact: False rounds to bfloat16 first, so that one base has the same digest in float32 and in bfloat16. True
            compares the bits as they are.
    """
    samples = _samples(tensor)
    return _digest(tensor.shape, [sample if exact else _rounded(sample) for sample in samples])


def whole_digest(tensor: Tensor) -> str:
    """A digest of shape and all values, for buffers, which are small. A collective if ``tensor`` is sharded."""
    tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
    return _digest(tensor.shape, [tensor.detach().reshape(-1)])


def _samples(tensor: Tensor) -> list[Tensor]:
    """The elements that a digest reads, for each stored part of ``tensor``."""
    if is_dtensor(tensor):
        elements = every_nth(tensor, _sample_step(tensor.numel()))
        if elements is not None:
            return [elements]
        tensor = tensor.full_tensor()
    return [part.detach().reshape(-1)[:: _sample_step(part.numel())] for part in stored_parts(tensor)]


def _sample_step(num_elements: int) -> int:
    """Distance of the elements that a digest reads."""
    return -(-num_elements // SAMPLE) or 1


class PiecewiseDigest:
    """The `weight_print` of a plain tensor whose elements arrive a few at a time, in any order."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        num_elements = torch.Size(shape).numel()
        self.step = _sample_step(num_elements)
        self.missing = -(-num_elements // self.step)
        self._sample: Tensor | None = None

    def add(self, numbers: Tensor, elements: Tensor) -> None:
        """Read some of the elements that count, each exactly once.

        Args:
            numbers: Number ``i`` stands for element ``i * step`` of the flattened tensor.
            elements: Their values.
        """
        if self._sample is None:
            self._sample = torch.empty(self.missing, dtype=elements.dtype)
        self._sample[numbers] = elements.to(self._sample.dtype)
        self.missing -= len(numbers)

    def print(self) -> WeightPrint:
        """The print of the tensor, once no element is missing."""
        assert self.missing == 0
        assert self._sample is not None
        return _print(tuple(self.shape), str(self._sample.dtype), [self._sample])


def _rounded(elements: Tensor) -> Tensor:
    return elements.to(torch.bfloat16) if elements.is_floating_point() else elements


def _digest(shape: tuple[int, ...], samples: Iterable[Tensor]) -> str:
    digest = hashlib.sha256(repr(tuple(shape)).encode())
    for sample in samples:
        digest.update(sample.contiguous().cpu().clone().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def base_digests(module: nn.Module, trained: Collection[str] = (), exact: bool = False) -> dict[str, str]:
    """Parameter name to digest, for all parameters of the base: neither adapters nor those named in ``trained``.

    The digest of a merged layer is the one of its weight before merging.

    Args:
        exact: Compare bits instead of values rounded to bfloat16 (see `tensor_digest`).
    """
    return _of_base(module, trained, lambda tensor: tensor_digest(tensor, exact))


def base_prints(module: nn.Module, trained: Collection[str] = ()) -> dict[str, WeightPrint]:
    """Parameter name to print, for the parameters that `base_digests` names."""
    return _of_base(module, trained, weight_print)


def _of_base(module: nn.Module, trained: Collection[str], make: Callable[[Tensor], _Made]) -> dict[str, _Made]:
    layers = [layer for layer in module.modules() if isinstance(layer, LoRALayer)]
    adapters = {id(factor) for layer in layers for factor in layer.lora_factors().values()}
    originals = {
        id(getattr(layer, name)): base for layer in layers for name, base in (layer.lora_base_weights or {}).items()
    }
    made: dict[int, _Made] = {}
    named = {}
    # A shared weight counts under each of its names, so that untying weights does not change the digests.
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in adapters or plain_name(name) in trained or name in trained:
            continue
        if id(parameter) not in made:
            made[id(parameter)] = make(originals.get(id(parameter), parameter))
        named[plain_name(name)] = made[id(parameter)]
    return named


def fingerprint(digests: Mapping[str, str] | Mapping[str, WeightPrint]) -> str:
    """One digest of a whole base from digests or prints of its parameters, in any order; 32 hexadecimal digits."""
    plain = {name: made.digest if isinstance(made, WeightPrint) else made for name, made in digests.items()}
    return hashlib.sha256(repr(sorted(plain.items())).encode()).hexdigest()[:32]


def other_weights(expected: Mapping[str, WeightPrint], found: Mapping[str, WeightPrint]) -> list[str]:
    """Names of the parameters that are not the same weight in both bases, or are in one of them only."""
    names = dict.fromkeys([*expected, *found])
    return [
        name for name in names if name not in expected or name not in found or not expected[name].agrees(found[name])
    ]
