"""The factors of a group as its products take them: in the type of the input, and every ``A`` below the other.

Factors in float32 on a base in bfloat16 are cast in each forward pass: on a GPU the launches of many small casts take
longer than the casts. So one launch casts a whole group, and from the second pass on one launch casts the factors of
all groups that the pass before asked for. Nobody says where a pass begins: it does when its first group is asked for
again.

A copy is handed out once, and only while its factor is the one it was made of: the same memory, in the same version.
Anything else (a second call of a layer within a pass, a pass without gradients or inside a backward pass, factors that
are gathered or computed) is cast for itself, as it is at that moment. So a change counts in the next pass, also one
past autograd, which leaves the version (``factor.data.add_(...)``); of these only one in the middle of a pass, to a
layer that is still to be called, counts a pass later.

Shape legend: ``r`` rank, ``R`` sum of ranks, ``in``/``out`` features.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_lora.lora.functional.torch_internals import has_values, in_backward, uninitialised

# Calls of a group since a pass began, after which the next one begins another: the first group is called no more.
_CALLS_OF_A_PASS = 2
# Bytes: products of bfloat16 on a CPU may round by where a factor lies, and tensor cores want 16.
_ALIGNED = 64


class Factors(NamedTuple):
    """Factors of a group in one type.

    Args:
        A: ``A`` of all layers below each other, ``(R, in)``.
        Bs: ``B`` of each layer, ``(out, r)``.
    """

    A: Tensor
    Bs: Sequence[Tensor]


class _Given(NamedTuple):
    """The factors of a group, ``A`` and ``B`` of each layer, and the type to cast them to."""

    As: Sequence[Tensor]
    Bs: Sequence[Tensor]
    dtype: torch.dtype

    def state(self) -> list[Any]:
        """What changes when somebody changes a factor."""
        return [(id(f), f.data_ptr(), f._version) for f in (*self.As, *self.Bs)]


@dataclass
class _Group:
    """What is known of a group that was asked for.

    Args:
        factors: Every ``A`` and every ``B``.
        dtype: The type that was asked for.
        asked_in: Number of the last pass in which it was asked for.
        calls: How often, in that pass.
        copies: Copies that nobody has taken yet.
        state: State of the factors when they were copied.
    """

    factors: Sequence[weakref.ref[Tensor]]
    dtype: torch.dtype
    asked_in: int = -1
    calls: int = 0
    copies: Factors | None = None
    state: list[Any] | None = None

    def given(self) -> _Given | None:
        """Its factors, if all of them exist and have memory: those of a sharded model may have none between calls."""
        factors = [factor for ref in self.factors if (factor := ref()) is not None]
        if len(factors) < len(self.factors) or not all(f.untyped_storage().nbytes() for f in factors):
            return None
        half = len(factors) // 2
        return _Given(factors[:half], factors[half:], self.dtype)


class _Passes(threading.local):
    """The passes of this thread: number and first ``A`` of the present one, and all groups by their first ``A``."""

    def __init__(self) -> None:
        self.number = 0
        self.leader: weakref.ref[Tensor] | None = None
        self.groups: Any = WeakIdKeyDictionary()


_passes = _Passes()


def group_factors(As: Sequence[Tensor], Bs: Sequence[Tensor], x: Tensor, is_learning: bool) -> Factors:
    """The factors in the type of ``x``, without a graph.

    Args:
        As: ``A`` of each layer, ``(r, in)``.
        Bs: ``B`` of each layer, ``(out, r)``.
    """
    if all(factor.dtype == x.dtype for factor in (*As, *Bs)):
        return Factors(As[0] if len(As) == 1 else torch.cat(list(As)), Bs)
    given = _Given(As, Bs, x.dtype)
    are_parameters = all(type(f) is nn.Parameter and has_values(f) for f in (*As, *Bs))
    if not (is_learning and are_parameters and has_values(x)) or in_backward():
        return _cast([given])[0]
    group = _known_group(given)
    if group.copies is None or group.state != given.state():
        group.copies = None
        if _begins_a_pass(As[0]) or group.calls >= _CALLS_OF_A_PASS:
            _begin_pass(group, given)
    copies, group.copies = group.copies or _cast([given])[0], None
    if group.asked_in != _passes.number:
        group.asked_in, group.calls = _passes.number, 0
    group.calls += 1
    return copies


def _known_group(given: _Given) -> _Group:
    factors = (*given.As, *given.Bs)
    known = _passes.groups.get(given.As[0])
    if known is not None and known.dtype == given.dtype and [id(ref()) for ref in known.factors] == [*map(id, factors)]:
        return known
    group = _passes.groups[given.As[0]] = _Group([weakref.ref(factor) for factor in factors], given.dtype)
    if known is not None:
        group.asked_in, group.calls = known.asked_in, known.calls
    return group


def _begins_a_pass(A: Tensor) -> bool:
    leader = None if _passes.leader is None else _passes.leader()
    return leader is None or leader is A


def _begin_pass(first: _Group, given: _Given) -> None:
    """Copy the factors of ``first`` and of all groups that the pass before asked for."""
    last, device, together = _passes.number, given.As[0].device, [(first, given)]
    for group in _passes.groups.values():
        group.copies = None  # one copy left over would keep the memory of all
        if group is first or group.asked_in != last or group.dtype != given.dtype:
            continue
        other = group.given()
        if other is not None and other.As[0].device == device:
            together.append((group, other))
    for (group, factors), copies in zip(together, _cast([factors for _, factors in together]), strict=True):
        group.copies, group.state = copies, factors.state()
    _passes.number, _passes.leader = last + 1, weakref.ref(given.As[0])


def _cast(groups: Sequence[_Given]) -> list[Factors]:
    """Copies of the factors of groups on one device, by one launch into one piece of memory."""
    factors = [factor for given in groups for factor in (*given.As, *given.Bs)]
    unit = max(1, _ALIGNED // groups[0].dtype.itemsize)
    starts, sizes, end = [], [], 0
    for given in groups:
        for number, factor in enumerate((*given.As, *given.Bs)):
            # Every A below the other without a gap; all else begins where products are fast, and round alike.
            gap = -end % unit if number == 0 or number >= len(given.As) else 0
            starts.append(end + gap)
            sizes += [gap, factor.numel()]
            end += gap + factor.numel()
    memory = uninitialised(factors[0], (end,), groups[0].dtype)
    targets = [part.view(f.shape) for part, f in zip(memory.split(sizes)[1::2], factors, strict=True)]
    torch._foreach_copy_(targets, [factor.detach() for factor in factors])
    found, at = [], 0
    for given in groups:
        n = len(given.As)
        last = starts[at + n - 1] + given.As[-1].numel()
        A = memory[starts[at] : last].view(-1, given.As[0].shape[-1])
        found.append(Factors(A, targets[at + n : at + 2 * n]))
        at += 2 * n
    return found
