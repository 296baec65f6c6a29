"""Batches of several arms as one: arguments of a module put together row by row, and its output taken apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASK = "attention_mask"


class CannotJoinError(Exception):
    """These batches cannot be one, or this output cannot be taken apart; says why."""


@dataclass(frozen=True)
class Rows:
    """Which rows of the joint batch belong to which arm.

    Args:
        counts: Number of rows of each arm; the rows of an arm are neighbours.
        lengths: Number of positions of each arm, where rows are padded to the longest; else empty.
    """

    counts: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    # What `split` found ``n`` to be, call by call, where it is not 1.
    multiples: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All rows."""
        return sum(self.counts)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of the arms of a tensor ``(rows * n, *)``, where ``n`` is any whole number.

        Raises:
            CannotJoinError: If the tensor has no such first axis.
        """
        if x.dim() == 0 or len(x) % self.total:
            raise CannotJoinError(f"a tensor of shape {tuple(x.shape)} has no rows")
        n = len(x) // self.total
        if n != 1:
            self.multiples.append(n)
        return x.split([count * n for count in self.counts])

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of the arms of an output ``(rows, *)``, without padding."""
        parts = self.split(x)
        if not self.lengths or x.dim() < 2 or x.shape[1] != max(self.lengths):
            return parts
        return tuple(part[:, :length] for part, length in zip(parts, self.lengths, strict=True))


def joined(calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> tuple[tuple[Any, ...], dict[str, Any], Rows]:
    """The arguments of several calls of a module as those of one.

    Rows are padded on the right to the longest, if a mask says which positions count.

    Raises:
        CannotJoinError: If the calls differ in anything but rows.
    """
    shapes = {(len(positional), tuple(named)) for positional, named in calls}
    if len(shapes) > 1:
        raise CannotJoinError("arms call the module with different arguments")
    tensors = [next((x for x in (*p, *n.values()) if isinstance(x, Tensor) and x.dim()), None) for p, n in calls]
    if any(tensor is None for tensor in tensors):
        raise CannotJoinError("the module is called without a tensor")
    rows = Rows(tuple(len(tensor) for tensor in tensors if tensor is not None))
    masks = [named.get(MASK) for _, named in calls]
    if all(isinstance(mask, Tensor) and mask.dim() == 2 for mask in masks):
        rows = Rows(rows.counts, tuple(mask.shape[1] for mask in masks))  # pyright: ignore[reportOptionalMemberAccess]
    positional = tuple(_one([call[0][place] for call in calls], rows) for place in range(len(calls[0][0])))
    named = {name: _one([call[1][name] for call in calls], rows) for name in calls[0][1]}
    return positional, named, rows


def _one(values: Sequence[Any], rows: Rows) -> Any:
    if not all(isinstance(value, Tensor) for value in values):
        if any(isinstance(value, Tensor) for value in values) or any(value != values[0] for value in values):
            raise CannotJoinError("arms call the module with different arguments")
        return values[0]
    if any(value.requires_grad and value.is_leaf for value in values):
        raise CannotJoinError("gradients of its inputs are asked for")
    if any(value.dim() == 0 or len(value) != count for value, count in zip(values, rows.counts, strict=True)):
        raise CannotJoinError("the module is called with tensors of different numbers of rows")
    if rows.lengths and all(v.dim() >= 2 and v.shape[1] == n for v, n in zip(values, rows.lengths, strict=True)):
        longest = max(rows.lengths)
        values = [F.pad(v, (*(0, 0) * (v.dim() - 2), 0, longest - v.shape[1])) for v in values]
    if len({value.shape[1:] for value in values}) > 1:
        raise CannotJoinError("arms have rows of different lengths, and no mask says which positions count")
    return torch.cat([*values])


def taken_apart(output: Any, rows: Rows, part_of: Callable[[Tensor], Sequence[Any]]) -> list[Any]:
    """What each arm gets of the output of a joint call: the same structure with its own tensors.

    Raises:
        CannotJoinError: If something in it has no rows.
    """
    arms = range(len(rows.counts))
    if isinstance(output, Tensor):
        return list(part_of(output))
    if isinstance(output, Mapping):
        parts = {name: taken_apart(value, rows, part_of) for name, value in output.items()}
        kind: Any = type(output)
        return [kind(**{name: value[arm] for name, value in parts.items()}) for arm in arms]
    if isinstance(output, (tuple, list)):
        items = [taken_apart(value, rows, part_of) for value in output]
        kind = type(output)
        made = kind._make if hasattr(kind, "_make") else kind
        return [made([item[arm] for item in items]) for arm in arms]
    if output is None or isinstance(output, (bool, int, float, str)):
        return [output for _ in arms]
    hint = "; use_cache=False leaves it out" if "Cache" in type(output).__name__ else ""
    raise CannotJoinError(f"it returns a {type(output).__name__}{hint}")
