"""Dropout that keeps a seed instead of a mask, and that layers with one input share.

A random byte decides each entry, so the probability is a multiple of 1/256; drawing the bytes eight at a time is what
makes this cheap. Layers called one after the other with the very same tensor (query, key and value; gate and up) get
one seed, and the mask made for the first serves the others, forward and backward.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor


class _Last(threading.local):
    """What was drawn last in this thread: for which tensor, and the mask, of its type."""

    x: weakref.ref[Tensor] | None = None
    version = -1
    users: set[int] = set()
    seed = -1
    made: object = None
    kept: Tensor | None = None


_last = _Last()


def shared_seed(x: Tensor, user: object) -> int:
    """A new seed from torch's random numbers, or the last one if others drew it for this tensor.

    Args:
        x: What will be dropped.
        user: Who asks; the same one asking again, as when a model runs twice on one batch, gets a new seed.
    """
    if _last.x is None or _last.x() is not x or _last.version != x._version or id(user) in _last.users:
        _last.x, _last.version, _last.users = weakref.ref(x), x._version, set()
        _last.seed = int(torch.randint(2**62, ()))
    _last.users.add(id(user))
    return _last.seed


def drop(x: Tensor, dropout: float, seed: int) -> Tensor:
    """``x`` with entries zeroed, the same ones for the same seed; divide by `kept_share` to keep the expectation.

    Args:
        x: Any tensor, in any shape of the same number of entries for the same seed.
        dropout: Probability, rounded to a multiple of 1/256; 0 returns ``x`` itself.
        seed: What decides the entries, from `shared_seed`.
    """
    if not dropout:
        return x
    wanted = seed, _threshold(dropout), x.numel(), x.dtype, x.device
    if _last.made != wanted or _last.kept is None:
        _last.kept, _last.made = _kept(x, dropout, seed), wanted
    return x * _last.kept.view(x.shape)


def kept_share(dropout: float) -> float:
    """The exact probability of keeping an entry."""
    return 1 - _threshold(dropout) / 256 if dropout else 1.0


def _threshold(dropout: float) -> int:
    return max(1, round(256 * dropout))


def _kept(x: Tensor, dropout: float, seed: int) -> Tensor:
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=torch.Generator(x.device).manual_seed(seed))
    # Written as numbers of x's type at once: on a CPU, torch multiplies by booleans six times more slowly.
    kept = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
    return torch.ge(words.view(torch.uint8)[: x.numel()], _threshold(dropout), out=kept)
