"""Products on rows sorted by expert, grouped and looped, against float64; and the rule for what can be grouped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.lora.functional import expert_rows
from lightning_lora.lora.functional.expert_rows import (
    ExpertRows,
    GroupedRows,
    LoopedRows,
    can_group,
    can_multiply,
    counts_of,
    rows_by_expert,
)

IN, OUT = 24, 16
# The second expert gets no row; the last two rows belong to none.
COUNTS, BEYOND = [5, 0, 3, 1], 2
USED, E = sum(COUNTS), len(COUNTS)
ENDS = torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

ways = pytest.mark.parametrize("rows", [GroupedRows(ENDS), LoopedRows(COUNTS)], ids=["grouped", "looped"])
types = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
sharing = pytest.mark.parametrize("num_matrices", [E, 1], ids=["own", "shared"])


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape).to(dtype)


def rows_with_nan(width: int, dtype: torch.dtype) -> Tensor:
    """Rows of experts, and NaN in those of none."""
    x = numbers(USED + BEYOND, width, dtype=dtype)
    x[USED:] = torch.nan
    return x


def by_row(matrices: Tensor) -> Tensor:
    """The matrix of each row that has one, in float64."""
    return matrices.double().expand(E, -1, -1)[torch.arange(E).repeat_interleave(torch.tensor(COUNTS))]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error <= TOLERANCES[found.dtype]


@ways
@types
@sharing
def test_each_row_is_multiplied_by_the_matrix_of_its_expert(
    rows: ExpertRows, dtype: torch.dtype, num_matrices: int
) -> None:
    x, matrices = rows_with_nan(IN, dtype), numbers(num_matrices, IN, OUT, dtype=dtype)
    wanted = torch.einsum("ti,tio->to", x[:USED].double(), by_row(matrices))
    assert_close(rows.times(x, matrices)[:USED], wanted)
    y = numbers(USED + BEYOND, OUT, dtype=dtype)
    wanted = y[:USED].double() + 0.3 * wanted
    rows.add_times(y, x, matrices, 0.3)
    assert_close(y[:USED], wanted)


@ways
@types
@sharing
def test_products_between_rows_take_those_of_the_expert_only(
    rows: ExpertRows, dtype: torch.dtype, num_matrices: int
) -> None:
    x, y = rows_with_nan(IN, dtype), rows_with_nan(OUT, dtype)
    each = torch.einsum("ti,to->tio", x[:USED].double(), y[:USED].double()).split(COUNTS)
    wanted = torch.stack([part.sum(0) for part in each])
    found = rows.between(x, y, num_matrices)
    assert_close(found, wanted if num_matrices == E else wanted.sum(0, keepdim=True))
    assert num_matrices == 1 or not found[1].any()


def test_rows_of_each_expert_are_read_from_where_they_end() -> None:
    assert counts_of(ENDS) == GroupedRows(ENDS).counts == LoopedRows(COUNTS).counts == COUNTS


@pytest.mark.parametrize(("rank", "padded"), [(1, 4), (4, 4), (6, 8)])
def test_ranks_are_padded_for_grouped_products_only(rank: int, padded: int) -> None:
    assert GroupedRows(ENDS).padded_rank(rank, torch.float32) == padded
    assert GroupedRows(ENDS).padded_rank(rank, torch.bfloat16) == 8
    assert LoopedRows(COUNTS).padded_rank(rank, torch.float32) == rank


@pytest.mark.parametrize("dtype", [torch.float64, *TOLERANCES], ids=str)
@pytest.mark.parametrize("num_in", [1, 4, 6, 8])
@pytest.mark.parametrize("transposed", [False, True], ids=["row by row", "column by column"])
def test_the_rule_is_that_of_torch(dtype: torch.dtype, num_in: int, transposed: bool) -> None:
    x = numbers(USED, num_in, dtype=dtype)
    matrices = numbers(E, OUT, num_in, dtype=dtype).mT if transposed else numbers(E, num_in, OUT, dtype=dtype)
    try:
        F.grouped_mm(x, matrices, offs=ENDS)
    except RuntimeError:
        assert not can_multiply(x, matrices)
    else:
        assert can_multiply(x, matrices)


@pytest.mark.parametrize(
    ("num_rows", "num_in", "num_out", "dtype"),
    [
        (0, IN, OUT, torch.float32),
        (USED, 6, OUT, torch.float32),
        (USED, IN, 6, torch.float32),
        (USED, 4, OUT, torch.bfloat16),
        (USED, IN, OUT, torch.float64),
    ],
    ids=["no rows", "in", "out", "in of two bytes", "float64"],
)
def test_what_cannot_be_grouped_is_looped(num_rows: int, num_in: int, num_out: int, dtype: torch.dtype) -> None:
    x, weights = numbers(num_rows, num_in, dtype=dtype), numbers(E, num_out, num_in, dtype=dtype)
    assert not can_group(x, weights)
    assert isinstance(rows_by_expert(x, weights, ENDS), LoopedRows)


def test_many_rows_an_expert_are_looped_on_a_cpu_and_grouped_elsewhere() -> None:
    weights = numbers(2, OUT, IN, dtype=torch.float32)
    limit = 2 * expert_rows._FEW_ROWS
    for num_rows, on_cpu in ((limit, GroupedRows), (limit + 1, LoopedRows)):
        x, ends = numbers(num_rows, IN, dtype=torch.float32), torch.tensor([num_rows, num_rows], dtype=torch.int32)
        assert type(rows_by_expert(x, weights, ends)) is on_cpu
        elsewhere = (tensor.to("meta") for tensor in (x, weights, ends))
        assert type(rows_by_expert(*elsewhere)) is GroupedRows
