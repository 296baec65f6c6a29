"""Tensors that training changes although no optimizer holds them: buffers, and frozen copies that follow a network.

Such are the running statistics of BatchNorm, the vectors of spectral norm, the ranges of quantisation observers, and
the weights of a teacher that is an average of the network in training. Each module keeps digests of its own from the
moment of injection, when it is still what every process can build again. A tensor that is not what it was then belongs
to the trained model, and is saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lora.lora.fingerprint import tensor_digest, whole_digest
from lightning_lora.lora.functional.torch_internals import has_values
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.base import is_factor
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.targets.selection import is_inside

_AT_INJECTION = "lora_at_injection"


def record_tensors(
    root: nn.Module, modules: Collection[str] = (), always: Collection[str] = (), *, keeps: bool = False
) -> None:
    """Remember every saved buffer in ``root`` as it is now, and every parameter in the named modules.

    Buffers are compared in full, parameters by the elements that `tensor_digest` samples. Sparse buffers, which an
    adapter folder cannot hold, are left out.

    Args:
        root: The module that is about to be adapted, or has just been.
        modules: Names of modules whose parameters something other than an optimizer may change.
        always: Names of modules whose parameters count as changed, because no other process can build them again.
        keeps: Whether what was recorded earlier stays as it is.
    """
    for name, module in root.named_modules():
        tensors = dict(_saved_buffers(module))
        own = {leaf: p for leaf, p in module._parameters.items() if p is not None and not is_factor(leaf)}
        if is_inside(plain_name(name), modules):
            tensors |= own
        before = module.__dict__.pop(_AT_INJECTION, {}) if keeps else {}
        found = {leaf: _digest(tensor) for leaf, tensor in tensors.items() if leaf not in before} | before
        if is_inside(plain_name(name), always):
            found |= dict.fromkeys(own)
        module.__dict__.pop(_AT_INJECTION, None)
        if found:
            module.__dict__[_AT_INJECTION] = found


def forget_tensors(root: nn.Module) -> None:
    """Forget what `record_tensors` has remembered."""
    for module in root.modules():
        module.__dict__.pop(_AT_INJECTION, None)


def recorded_parameters(root: nn.Module) -> set[str]:
    """Dotted names of the parameters that were recorded."""
    return {name for name, tensor, _ in _recorded(root) if isinstance(tensor, nn.Parameter)}


def changed_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Dotted name to every recorded tensor that is not what it was. A collective if parameters are sharded.

    A tensor that had no values then (on the meta device) counts as changed, and so does a buffer that was registered
    since beside a recorded one.
    """
    return {name: tensor for name, tensor, before in _recorded(root) if before is None or _digest(tensor) != before}


def _recorded(root: nn.Module) -> Iterator[tuple[str, Tensor, str | None]]:
    """Dotted name, present tensor and digest at injection."""
    for prefix, module in root.named_modules():
        before = module.__dict__.get(_AT_INJECTION)
        if before is None:
            continue
        tensors = dict(_saved_buffers(module))
        tensors |= {leaf: p for leaf, p in module._parameters.items() if p is not None and leaf in before}
        for leaf, tensor in tensors.items():
            yield plain_name(join(prefix, leaf)), tensor, before.get(leaf)


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set and buffer.layout is torch.strided:
            yield name, buffer


def _digest(tensor: Tensor) -> str | None:
    """A digest of the values; None if there are none yet."""
    if is_lazy(tensor) or not has_values(tensor):
        return None
    return tensor_digest(tensor, exact=True) if isinstance(tensor, nn.Parameter) else whole_digest(tensor)
