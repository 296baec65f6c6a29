"""The update of a weight, as merging adds it."""

from __future__ import annotations

import torch

from lightning_lora.lora.functional import weight_update


def test_an_update_is_formed_in_float32_from_narrower_factors() -> None:
    A, B = (torch.randn(shape).to(torch.bfloat16) for shape in ((4, 16), (8, 4)))
    update = weight_update(A, B, 0.3)
    assert update.dtype is torch.float32
    torch.testing.assert_close(update.double(), 0.3 * B.double() @ A.double(), rtol=1e-6, atol=1e-7)


def test_an_update_of_wider_factors_stays_as_wide() -> None:
    A, B = torch.randn(4, 16, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    assert weight_update(A, B, 0.3).dtype is torch.float64
