"""Comparisons of branches: what counts as worse, and how many comparisons it must stand among."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.study.comparison import Comparison, compared
from lightning_lora.study.statistics.crossed import paired_interval


def losses(mean: float, spread: float, seed: int = 0, rows: int = 256) -> torch.Tensor:
    noise = torch.randn(1, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + spread * (noise - noise.mean())


def test_a_branch_is_judged_as_a_study_is() -> None:
    rows = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = Comparison.of(8, 16, rows)
    assert found.interval == paired_interval(rows.numpy())
    assert str(found).startswith(f"{float(rows.mean()):+.4f} (")


def test_the_words_of_a_comparison() -> None:
    assert Comparison.of(1, 2, losses(0.001, 0.01)).word == "matches"
    assert Comparison.of(1, 2, losses(0.008, 0.01)).is_worse
    assert Comparison.of(1, 2, losses(-0.008, 0.01)).word == "ahead"
    assert Comparison.of(1, 2, losses(-0.008, 0.01)).is_harmless


@pytest.mark.parametrize("spread", [0.06, 0.2, 1.0, 10.0])
def test_more_noise_never_makes_a_batch_harmless(spread: float) -> None:
    """A tolerance of two standard errors would call every noisy branch harmless."""
    assert Comparison.of(1, 2, losses(0.0, spread)).word == "cannot tell"
    assert not Comparison.of(1, 2, losses(0.0, spread)).is_harmless


def test_a_pair_must_stand_among_all_pairs() -> None:
    """Alone at p = .03, and one of three."""
    single = Comparison.of(8, 16, losses(0.0115, 0.1))
    assert single.word == "behind"
    assert 0.02 < single.interval.p_behind < 0.05
    other = losses(0.0115, 0.1)
    found = compared({8: torch.zeros(1, 256), 16: other, 32: other + losses(0.0, 0.2, seed=1)})
    assert found[0].interval == single.interval
    assert found[0].word == "cannot tell"
