"""The bits that the base model itself needs to write the training targets: how much of them it does not know yet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseBits:
    """Bits of the unique supervised tokens for the base model, from a random sample of rows.

    Args:
        bits: Estimated bits of all unique rows.
        low: Lower end of the 95 % interval.
        high: Upper end.
        rows: Rows of the sample.
        tokens: Supervised tokens of the sample.
    """

    bits: float
    low: float
    high: float
    rows: int
    tokens: int
