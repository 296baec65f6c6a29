"""Which part of a weight of fused experts each stored tensor holds, as checkpoints split what the model fuses.

A checkpoint may store every expert by itself, gate and up apart, and either transposed or not. Only transformers knows
the layout. Row numbers are therefore converted as transformers converts weights (`row_numbers`), and the places where
they arrive tell what each tensor holds (`expert_parts`). No layout is written down a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFolderError
from lightning_lora.files.merge.row_blocks import StoredUpdate


@dataclass(frozen=True)
class FusedWeight:
    """A weight of fused experts as the model has it.

    Args:
        name: Name of the adapted weight.
        shape: Shape of the parameter, ``(experts, out, in)`` or ``(experts, in, out)``.
        transposed: Whether the shape is ``(experts, in, out)``.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def num_out(self) -> int:
        """Outputs of one expert."""
        return self.shape[2] if self.transposed else self.shape[1]

    @property
    def num_in(self) -> int:
        """Inputs of one expert."""
        return self.shape[1] if self.transposed else self.shape[2]


@dataclass(frozen=True)
class ExpertPart:
    """The part of a weight of fused experts that a stored tensor holds.

    Args:
        fused: The weight.
        first: Number of the first expert in the tensor.
        num_experts: Number of consecutive experts in the tensor.
        rows: The outputs of each expert in the tensor, ``(rows)``, in order.
        transposed: Whether an expert is stored ``(in, rows)``.
    """

    fused: FusedWeight
    first: int
    num_experts: int
    rows: Tensor
    transposed: bool

    def update(self, name: str, A: Tensor, B: Tensor, scale: float, shape: tuple[int, ...]) -> StoredUpdate:
        """The update of the stored tensor ``name``.

        Args:
            A: The first factors of all experts, ``(experts or 1, rank, in)``.
            B: The second factors of all experts, ``(experts or 1, out, rank)``.

        Raises:
            AdapterFileError: If the update does not fit the shape.
        """
        sides = (self.fused.num_in, len(self.rows)) if self.transposed else (len(self.rows), self.fused.num_in)
        # A tensor of one expert may have an axis for it or not.
        if shape not in ((self.num_experts, *sides), *([sides] if self.num_experts == 1 else [])):
            raise AdapterFolderError(f"{name}: the update is {(self.num_experts, *sides)}, the weight {shape}.")
        mine = slice(self.first, self.first + self.num_experts)
        A, B = A if len(A) == 1 else A[mine], (B if len(B) == 1 else B[mine])[:, self.rows]
        return StoredUpdate(A.mT, B.mT, scale) if self.transposed else StoredUpdate(B, A, scale)

    def sampled(self, step: int) -> tuple[Tensor, Tensor]:
        """Find where the stored tensor holds every ``step``-th element of the fused weight.

        Returns:
            The positions of these elements in the stored tensor, ascending, and their numbers among all of them.
        """
        size = self.fused.num_out * self.fused.num_in
        first, stop = (-(-expert * size // step) for expert in (self.first, self.first + self.num_experts))
        numbers = torch.arange(first, stop)
        experts, inner = (numbers * step).div(size, rounding_mode="floor"), numbers * step % size
        middle, last = inner // self.fused.shape[2], inner % self.fused.shape[2]
        out, column = (last, middle) if self.fused.transposed else (middle, last)
        place = torch.full((self.fused.num_out,), -1)
        place[self.rows] = torch.arange(len(self.rows))
        row = place[out]
        inside = row * self.fused.num_in + column if not self.transposed else column * len(self.rows) + row
        positions = (experts - self.first) * (len(self.rows) * self.fused.num_in) + inside
        positions, numbers = positions[row >= 0], numbers[row >= 0]
        order = positions.argsort()
        return positions[order], numbers[order]


def row_numbers(fused: FusedWeight) -> Tensor:
    """A weight like ``fused`` but with a single input, whose rows hold their number: ``expert * outputs + output``."""
    num_experts = fused.shape[0]
    numbers = torch.arange(num_experts * fused.num_out, dtype=torch.int32).reshape(num_experts, fused.num_out, 1)
    return numbers.mT if fused.transposed else numbers


def expert_parts(fused: FusedWeight, stored: Mapping[str, Tensor], seen: dict[bytes, Tensor]) -> dict[str, ExpertPart]:
    """Find what each stored tensor holds, by the `row_numbers` that arrived there.

    Args:
        stored: Name of the stored tensor to its row numbers.
        seen: Lists of rows met before, extended here. The experts of a model share few lists, so one copy is kept.

    Raises:
        AdapterFileError: If the checkpoint mixes experts in an unknown way.
    """
    parts = {}
    for name, numbers in stored.items():
        transposed = numbers.ndim > 1 and numbers.shape[-1] != 1
        whole = numbers.ndim < 3
        lists = numbers.reshape(1 if whole else len(numbers), -1).long()
        experts, rows = lists // fused.num_out, lists[0] % fused.num_out
        follow = experts == experts[0, 0] + torch.arange(len(lists))[:, None]
        if not bool(follow.all()) or not bool((lists % fused.num_out == rows).all()):
            raise AdapterFolderError(f"{name} mixes rows of several experts of {fused.name}, which is not supported.")
        rows = seen.setdefault(rows.numpy().tobytes(), rows.clone())
        parts[name] = ExpertPart(fused, int(experts[0, 0]), len(lists), rows, transposed)
    held = sum(part.num_experts * len(part.rows) for part in parts.values())
    if held != fused.shape[0] * fused.num_out:
        raise AdapterFolderError(
            f"{next(iter(stored))} and others hold {held} of the {fused.shape[0] * fused.num_out} rows of {fused.name}."
        )
    return parts
