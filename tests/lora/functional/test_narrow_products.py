"""Products with a narrow side are the products, at every width."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.lora.functional.narrow_products import fast_layout, transposed_times_narrow


@pytest.mark.parametrize("rank", [1, 2, 8, 15, 16, 40])
@pytest.mark.parametrize("rows", [0, 1, 30])
def test_the_order_of_multiplication_changes_no_value(rows: int, rank: int) -> None:
    y, B = torch.randn(rows, 12, dtype=torch.float64), torch.randn(12, rank, dtype=torch.float64)
    inner = torch.randn(rows, rank, dtype=torch.float64)
    torch.testing.assert_close(y @ fast_layout(B), y @ B)
    torch.testing.assert_close(transposed_times_narrow(y, inner), y.T @ inner)
    assert transposed_times_narrow(y, inner).shape == (12, rank)
