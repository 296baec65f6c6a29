"""Holm's correction: with several comparisons, one of them is wrong in at most ``alpha`` of studies."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, in the order given.

    The smallest is multiplied by their number ``m``, the next by ``m - 1``, and so on; none gets below one before it.

    References:
        Holm, *A simple sequentially rejective multiple test procedure*, 1979.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - place)))
        corrected[index] = largest
    return corrected
