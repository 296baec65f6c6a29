"""Digests of base weights: is this the model the adapter was trained on, and did training leave it unchanged?"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.quantised_weights import stored_parts
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.shards import every_nth, is_dtensor

SAMPLE = 65_536
"""The most elements of a tensor that a digest reads."""


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
    """The `tensor_digest` of a plain tensor whose elements arrive a few at a time, in any order.

    Args:
        shape: Shape of the tensor.
    """

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
            dtype = torch.bfloat16 if elements.is_floating_point() else elements.dtype
            self._sample = torch.empty(self.missing, dtype=dtype)
        self._sample[numbers] = _rounded(elements)
        self.missing -= len(numbers)

    def hexdigest(self) -> str:
        """The digest, once no element is missing."""
        assert self.missing == 0
        assert self._sample is not None
        return _digest(self.shape, [self._sample])


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
        module: A module, adapted or not.
        trained: Names of parameters that are trained in full.
        exact: Compare bits instead of values rounded to bfloat16 (see `tensor_digest`).
    """
    layers = [layer for layer in module.modules() if isinstance(layer, LoRALayer)]
    adapters = {id(factor) for layer in layers for factor in layer.lora_factors().values()}
    originals = {
        id(getattr(layer, name)): base for layer in layers for name, base in (layer.lora_base_weights or {}).items()
    }
    digests: dict[int, str] = {}
    named = {}
    # A shared weight counts under each of its names, so that untying weights does not change the digests.
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in adapters or plain_name(name) in trained or name in trained:
            continue
        if id(parameter) not in digests:
            digests[id(parameter)] = tensor_digest(originals.get(id(parameter), parameter), exact)
        named[plain_name(name)] = digests[id(parameter)]
    return named


def fingerprint(digests: Mapping[str, str]) -> str:
    """One digest of a whole base from the digests of its parameters, in any order; 32 hexadecimal digits."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:32]
