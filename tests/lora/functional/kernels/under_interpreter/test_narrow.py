"""Two narrow products from one read, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora.lora.functional.kernels import narrow as kernels
from tests.lora.functional.kernels.under_interpreter.memory import Memory
from tests.lora.functional.kernels.under_interpreter.near import TYPES, assert_rounded_once

# Rows, columns, rank.
SHAPES = {
    "one row": (1, 5, 1),
    "one column": (17, 1, 3),
    "a block": (256, 64, 16),
    "past every block": (300, 70, 33),
    "largest rank": (70, 130, 128),
}
LAYOUTS = ("contiguous", "transposed", "slices", "expanded")


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor]:
    rows, columns, rank = shape
    y, B, S = (torch.randn(size).to(dtype) for size in ((rows, columns), (columns, rank), (rows, rank)))
    if layout == "transposed":
        return [t.T.contiguous().T for t in (y, B, S)]
    if layout == "slices":
        return [torch.cat([t.new_full(t.shape, torch.nan), t], 1)[:, t.shape[1] :] for t in (y, B, S)]
    return [y[:1].expand(y.shape), B, S] if layout == "expanded" else [y, B, S]


def check(kernels: Any, memory: Memory, y: Tensor, B: Tensor, S: Tensor) -> None:
    """Both products of a module of kernels for these tensors."""
    memory.allow(y, B, S)
    beside = torch.zeros(len(y), 2 * B.shape[1], dtype=y.dtype)
    by_rows = beside[:, : B.shape[1]]
    by_columns = kernels.both_narrow(by_rows, y, B, S, 0.5)
    assert not beside[:, B.shape[1] :].any()
    assert by_columns.dtype is torch.float32
    lost = 1e-6 * max(y.shape) ** 0.5
    assert_rounded_once(by_rows, 0.5 * y.double() @ B.double(), lost)
    assert_rounded_once(by_columns, y.double().T @ S.double(), lost)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_are_those_of_float64_rounded_once(
    shape: tuple[int, int, int], dtype: torch.dtype, memory: Memory
) -> None:
    check(kernels, memory, *inputs(shape, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout_are_read(layout: str, memory: Memory) -> None:
    check(kernels, memory, *inputs((37, 70, 5), torch.float32, layout))


@pytest.mark.parametrize("programs", [1, 2, 4])
def test_columns_divided_over_programs_add_up(programs: int, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program goes over all five blocks of columns, or each over some of them, the last over fewer."""
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    check(kernels, memory, *inputs((20, 300, 5), torch.float32))


def test_the_same_inputs_give_the_same_bits() -> None:
    y, B, S = inputs((300, 70, 5), torch.bfloat16)
    by_rows = torch.empty(2, 300, 5)
    by_columns = [kernels.both_narrow(result, y, B, S, 1.0) for result in by_rows]
    assert torch.equal(*by_rows)
    assert torch.equal(*by_columns)
