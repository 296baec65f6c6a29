"""Digests of base weights: is this the model the adapter was trained on, and did training leave it alone?"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.quantised import stored_parts
from lightning_lora.patterns import plain_name

SAMPLE = 65_536


def tensor_digest(tensor: Tensor, exact: bool = False) -> str:
    """A digest of shape and values, 16 hexadecimal digits.

    At most 65,536 evenly spaced entries are read, so that a 70B model takes seconds. A quantised weight counts with
    its codes and scales as they are stored.

    Args:
        tensor: Any tensor with memory.
        exact: False rounds to bfloat16 first, so that one base loaded in float32 and in bfloat16 agree. True compares
            the bits as they are.
    """
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    for part in stored_parts(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor):
        flat = part.detach().reshape(-1)
        step = -(-flat.numel() // SAMPLE) or 1
        sample = flat[::step]
        if sample.is_floating_point() and not exact:
            sample = sample.to(torch.bfloat16)
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
