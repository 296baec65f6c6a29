"""Dropout that keeps a seed instead of a mask; layers with the same input share both.

A random byte decides each entry, so the probability is a multiple of 1/256. The bytes are drawn eight at a time, which
is what makes this cheap. Layers called one after the other with the very same tensor (query, key and value; gate and
up) get one seed, and the mask made for the first of them serves the others, forward and backward.

A CUDA graph cannot draw a seed on the host: each replay would drop the same entries. While one is captured, the seed is
the random bytes themselves, drawn by the device's own generator, which moves on with each replay; they are kept for the
backward pass, one byte an entry.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora.errors import ConfigError
from lightning_lora.lora.functional.torch_internals import in_backward, is_captured, saved_tensor_hooks, uninitialised

Seed = int | Tensor
"""Decides which entries are dropped: a number to draw random bytes with, or the bytes, ``(words,)`` of 64 bits."""


class _Latest(threading.local):
    """The latest seed of this thread with what it was drawn for, and the latest mask with what it depends on."""

    x: weakref.ref[Tensor] | None = None
    version = -1
    is_grad_enabled = True
    pack_hook: weakref.ref[object] | None = None
    callers: set[int] = set()
    seed: Seed = -1
    mask_seed: Seed = -1
    mask_key: object = None
    mask: Tensor | None = None


_latest = _Latest()


def shared_seed(x: Tensor, callers: Sequence[object]) -> Seed:
    """A seed for the dropout of ``x``: the latest one if other callers drew it for this tensor, else a new one.

    New seeds come from torch's CPU generator, or from the device's while a CUDA graph is captured. A seed is not shared
    across the border of activation checkpointing, whose second run must find the mask of the first wherever the border
    lies.

    Args:
        x: The tensor whose entries are dropped.
        callers: The layers that use the seed, told apart by identity. A layer that asks again, as when a model runs
            twice on one batch, gets a new seed.
    """
    ids = set(map(id, callers))
    if not _is_latest(x) or ids & _latest.callers:
        _latest.x, _latest.version, _latest.callers = weakref.ref(x), x._version, set()
        hooks = saved_tensor_hooks()
        _latest.is_grad_enabled = torch.is_grad_enabled()
        _latest.pack_hook = None if hooks is None else weakref.ref(hooks[0])
        _latest.seed = _captured_bytes(x) if is_captured(x) else int(torch.randint(2**62, ()))
    _latest.callers |= ids
    return _latest.seed


def _captured_bytes(x: Tensor) -> Tensor:
    if in_backward():
        raise ConfigError(
            "dropout of adapters under activation checkpointing cannot be captured in a CUDA graph: the second run "
            "would draw another mask. Set dropout to 0, or capture without activation checkpointing."
        )
    return _words(x)


def _is_latest(x: Tensor) -> bool:
    """Whether the latest seed was drawn for ``x`` as it is, on this side of activation checkpointing."""
    if _latest.x is None or _latest.x() is not x or _latest.version != x._version:
        return False
    if isinstance(_latest.seed, Tensor) != is_captured(x):
        return False
    # One kind of checkpointing switches gradients off in its first run, the other sets hooks of its own in each run.
    pack_hook = _latest.pack_hook and _latest.pack_hook()
    hooks = saved_tensor_hooks()
    return _latest.is_grad_enabled == torch.is_grad_enabled() and pack_hook is (hooks and hooks[0])


def drop(x: Tensor, dropout: float, seed: Seed) -> Tensor:
    """``x`` with entries set to zero, the same ones for the same seed; divide by `kept_share` to keep the expectation.

    Args:
        x: Any tensor; tensors with as many entries, in any shape, lose the same ones for the same seed.
        dropout: Probability of zeroing an entry, rounded to a multiple of 1/256, at least one; 0 returns ``x`` itself.
        seed: Decides which entries are zeroed, from `shared_seed`.
    """
    if not dropout:
        return x
    key = _threshold(dropout), x.numel(), x.dtype, x.device
    last = _latest.mask_seed
    is_same = last is seed if isinstance(seed, Tensor) or isinstance(last, Tensor) else last == seed
    if not is_same or _latest.mask_key != key or _latest.mask is None:
        _latest.mask, _latest.mask_key, _latest.mask_seed = _mask(x, dropout, seed), key, seed
    return x * _latest.mask.view(x.shape)


def forget_mask() -> None:
    """Forget the latest mask: the next one of the same seed is drawn again, as after a trace without values."""
    _latest.mask, _latest.mask_key, _latest.mask_seed = None, None, -1


def kept_share(dropout: float) -> float:
    """The exact probability of keeping an entry."""
    return 1 - _threshold(dropout) / 256 if dropout else 1.0


def _threshold(dropout: float) -> int:
    return max(1, round(256 * dropout))


def _mask(x: Tensor, dropout: float, seed: Seed) -> Tensor:
    """1 for each entry of ``x`` that is kept, 0 for the others: ``(entries,)``."""
    words = seed if isinstance(seed, Tensor) else _words(x, torch.Generator(x.device).manual_seed(seed))
    # Written as numbers of x's type at once: on a CPU, torch multiplies by booleans six times more slowly.
    mask = uninitialised(x, (x.numel(),))
    return torch.ge(words.view(torch.uint8)[: x.numel()], _threshold(dropout), out=mask)


def _words(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A random byte for each entry of ``x``, eight in a word."""
    words = uninitialised(x, (-(-x.numel() // 8),), torch.int64)
    return words.random_(-(2**63), None, generator=generator)
