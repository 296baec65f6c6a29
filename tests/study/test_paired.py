"""Intervals of paired differences, and what counts as worse."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lora.study.paired import Comparison


def test_losses_of_several_orders_have_an_interval_over_orders_and_rows() -> None:
    """Crossed effects of 0.3 and 1.0 in 40 orders and 400 rows: the error is that of both means."""
    generator = torch.Generator().manual_seed(0)
    orders = 0.3 * torch.randn(40, 1, generator=generator, dtype=torch.float64)
    rows = torch.randn(1, 400, generator=generator, dtype=torch.float64)
    both = Comparison.of(1, 2, orders + rows)
    assert both.error == pytest.approx(math.sqrt(0.3**2 / 40 + 1 / 400), rel=0.1)
    assert Comparison.of(1, 2, rows).error == pytest.approx(1 / math.sqrt(400), rel=0.1)


def test_a_small_difference_is_none_however_sure_it_is() -> None:
    assert not Comparison(1, 2, 0.004, 1e-6).is_worse
    assert Comparison(1, 2, 0.006, 1e-6).is_worse
    assert not Comparison(1, 2, 0.006, 0.004).is_worse
