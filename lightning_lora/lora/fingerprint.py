"""Digests of base weights: is this the model the adapter was trained on, and did training leave it alone?"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.quantised_weights import stored_parts
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.shards import every_nth

SAMPLE = 65_536


def tensor_digest(tensor: Tensor, exact: bool = False) -> str:
    """A digest of shape and values, 16 hexadecimal digits.

    At most 65,536 evenly spaced entries are read, and of a sharded tensor exchanged, so that a 70B model takes seconds.
    A quantised weight counts with its codes and scales as they are stored.

    Args:
        tensor: Any tensor with memory; of a sharded one all ranks must ask, and get the digest of the whole.
        exact: False rounds to bfloat16 first, so that one base loaded in float32 and in bfloat16 agree. True compares
            the bits as they are.
    """
    samples = _samples(tensor)
    return _digest(tensor.shape, [sample if exact else _rounded(sample) for sample in samples])


def _samples(tensor: Tensor) -> list[Tensor]:
    """The entries that count."""
    if isinstance(tensor, DTensor):
        entries = every_nth(tensor, sample_step(tensor.numel()))
        if entries is not None:
            return [entries]
        tensor = tensor.full_tensor()
    return [part.detach().reshape(-1)[:: sample_step(part.numel())] for part in stored_parts(tensor)]


def sample_step(num_elements: int) -> int:
    """Distance of the entries that a digest reads of a tensor."""
    return -(-num_elements // SAMPLE) or 1


class PiecewiseDigest:
    """`tensor_digest` of a plain tensor of which only a few entries are at hand at a time, in any order.

    Args:
        shape: Of the tensor.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        num_elements = torch.Size(shape).numel()
        self.step = sample_step(num_elements)
        self.missing = -(-num_elements // self.step)
        self._sample: Tensor | None = None

    def add(self, numbers: Tensor, entries: Tensor) -> None:
        """Count the ``numbers``-th ones of every `step`-th entry, each of which comes once."""
        if self._sample is None:
            like = torch.bfloat16 if entries.is_floating_point() else entries.dtype
            self._sample = torch.empty(self.missing, dtype=like)
        self._sample[numbers] = _rounded(entries)
        self.missing -= len(numbers)

    def hexdigest(self) -> str:
        """The digest, once nothing is missing."""
        assert self.missing == 0
        assert self._sample is not None
        return _digest(self.shape, [self._sample])


def _rounded(entries: Tensor) -> Tensor:
    return entries.to(torch.bfloat16) if entries.is_floating_point() else entries


def _digest(shape: tuple[int, ...], samples: Iterable[Tensor]) -> str:
    digest = hashlib.sha256(repr(tuple(shape)).encode())
    for sample in samples:
        digest.update(sample.contiguous().cpu().clone().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def base_digests(module: nn.Module, trained: Collection[str] = (), exact: bool = False) -> dict[str, str]:
    """Parameter name to digest of the base: all parameters but the adapters and those named in ``trained``.

    A merged layer counts with the weight it had before.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, LoRALayer)]
    adapters = {id(factor) for layer in layers for factor in layer.lora_factors().values()}
    originals = {
        id(getattr(layer, name)): base for layer in layers for name, base in (layer.lora_base_weights or {}).items()
    }
    digests: dict[int, str] = {}
    named = {}
    # Shared weights count under each name, so that a base is the same before and after its weights are untied.
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in adapters or plain_name(name) in trained or name in trained:
            continue
        if id(parameter) not in digests:
            digests[id(parameter)] = tensor_digest(originals.get(id(parameter), parameter), exact)
        named[plain_name(name)] = digests[id(parameter)]
    return named


def fingerprint(digests: Mapping[str, str]) -> str:
    """One digest of a whole base, from the digests of its parameters in any order."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:32]
