"""Bin packing fills rows well and loses no example."""

from __future__ import annotations

import doctest
from itertools import chain

import numpy
import pytest

from lightning_lora.data.batches import bins
from lightning_lora.data.batches.bins import best_fit, even_rows


@pytest.mark.parametrize("shortest", [1, 40])
def test_packs_are_full_and_never_too_full(shortest: int) -> None:
    lengths = numpy.random.default_rng(0).integers(shortest, 65, 2000)
    filled = [int(lengths[pack].sum()) for pack in best_fit(lengths.tolist(), 64)]
    assert max(filled) <= 64
    assert sum(filled) == lengths.sum()
    # Rows of more than half a pack cannot share one.
    assert shortest > 32 or sum(filled) / (64 * len(filled)) > 0.97


@pytest.mark.parametrize("shortest", [1, 30, 64])
def test_even_rows_are_few_and_hardly_padded(shortest: int) -> None:
    for seed in range(20):
        lengths = numpy.random.default_rng(seed).integers(shortest, 65, 32).tolist()
        rows = even_rows(lengths)
        used = [sum(lengths[example] for example in row) for row in rows]
        assert sorted(chain(*rows)) == list(range(32))
        assert max(used) <= 2.5 * max(lengths)
        assert sum(used) / (len(rows) * max(used)) > 0.9
    assert even_rows([7]) == [[0]]


def test_the_examples_run() -> None:
    failed, tried = doctest.testmod(bins)
    assert tried == 3
    assert not failed
