"""Values of the base in tensors that training changes beside the adapters, kept to compute with the base again.

A copy is made when a module is adapted: of every module trained in full, and of the running statistics of
normalisation layers, which change in training without gradients. Models without either keep no copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.errors import AlreadyShardedError, LayerError, first_five
from lightning_lora.lora.shards import is_dtensor, is_flattened, reshard

# Attribute of the module that owns the tensors, so that copies and pickles of it hold them too: name to value in the
# base, None where there was none yet.
_KEPT = "lora_base_values"


def keep_base_values(root: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Copy ``tensors`` of ``root``, and running statistics, unless a copy is kept already.

    Args:
        root: The adapted module, before training changes it.
        tensors: Parameters and buffers that will be trained. All modules that share one share its copy.
    """
    changing = {id(tensor) for tensor in tensors}
    changing |= {id(buffer) for m in root.modules() if isinstance(m, _NormBase) for buffer in m.buffers(recurse=False)}
    copies: dict[int, Tensor | None] = {}
    for owner in root.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            kept = owner.__dict__.get(_KEPT, {})
            if tensor is None or id(tensor) not in changing or name in kept:
                continue
            if id(tensor) not in copies:
                copies[id(tensor)] = None if tensor.is_meta else _copy(tensor)
            owner.__dict__[_KEPT] = kept | {name: copies[id(tensor)]}


def forget_base_values(root: nn.Module) -> None:
    """Free what `keep_base_values` keeps."""
    for owner in root.modules():
        owner.__dict__.pop(_KEPT, None)


@contextmanager
def base_values(root: nn.Module) -> Iterator[None]:
    """Within the context, ``root`` computes with the values kept; on leaving, its tensors are the objects they were.

    Other objects take the place of the tensors, so optimizers, gradients and graphs of the trained ones stay valid.

    Raises:
        ConfigError: If a tensor had no values when it should have been copied.
        AlreadyShardedError: If a parameter trained in full is sharded: what is kept is whole.
    """
    if not any(_KEPT in owner.__dict__ for owner in root.modules()):
        yield
        return
    reshard(root)
    kept = [(owner, name) for owner in root.modules() for name in owner.__dict__.get(_KEPT, {})]
    _check_places(kept)
    before: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
    converted: dict[int, Tensor] = {}
    try:
        for owner, name in kept:
            place = _place(owner, name)
            before.append((place, name, place[name]))
            place[name] = _value(owner, name, place[name], converted)
        yield
    finally:
        for place, name, tensor in reversed(before):
            place[name] = tensor


def _check_places(kept: list[tuple[nn.Module, str]]) -> None:
    sharded = [f"{type(owner).__name__}.{name}" for owner, name in kept if _is_sharded(owner, name)]
    if sharded:
        raise AlreadyShardedError(
            f"{len(sharded)} tensors trained in full are sharded ({first_five(sharded)}), so the module cannot compute "
            f"with their values in the base. Keep modules named in `trainable` out of the shards, or load the base "
            f"beside."
        )
    empty = [f"{type(owner).__name__}.{name}" for owner, name in kept if owner.__dict__[_KEPT][name] is None]
    if empty:
        raise LayerError(
            f"{len(empty)} tensors trained in full were on the meta device when the module was adapted "
            f"({first_five(empty)}), so their values in the base are not known. Adapt the module after its weights "
            f"are loaded."
        )
    other = [
        f"{type(owner).__name__}.{name}"
        for owner, name in kept
        if getattr(owner, name).shape != owner.__dict__[_KEPT][name].shape
    ]
    if other:
        raise LayerError(
            f"{len(other)} tensors trained in full have another shape than when the module was adapted "
            f"({first_five(other)}). Resize before adapting."
        )


def _is_sharded(owner: nn.Module, name: str) -> bool:
    # FSDP1 takes flattened parameters out of their module.
    if name not in owner._parameters and name not in owner._buffers:
        return True
    tensor = _place(owner, name)[name]
    return tensor is not None and (is_dtensor(tensor) or is_flattened(tensor))


def _place(owner: nn.Module, name: str) -> dict[str, Tensor | None]:
    return owner._parameters if name in owner._parameters else owner._buffers  # pyright: ignore[reportReturnType]


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def _value(owner: nn.Module, name: str, like: Tensor | None, converted: dict[int, Tensor]) -> Tensor:
    """The value kept, of the type and on the device of ``like``; it stays there for the next time.

    Buffers are copied, as a forward pass in training changes them.
    """
    value: Tensor = owner.__dict__[_KEPT][name]
    assert like is not None
    if id(value) not in converted:
        moved = value.detach().to(like.device, like.dtype)
        converted[id(value)] = nn.Parameter(moved, requires_grad=False) if isinstance(value, nn.Parameter) else moved
    owner.__dict__[_KEPT][name] = found = converted[id(value)]
    converted[id(found)] = found
    return found if isinstance(found, nn.Parameter) else torch.clone(found)
