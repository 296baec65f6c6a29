"""Comparisons of two branches of a probe, by the losses of single held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import Tensor

from lightning_lora.study.statistics.crossed import paired_interval
from lightning_lora.study.statistics.holm import holm
from lightning_lora.study.statistics.interval import ALPHA, Interval
from lightning_lora.study.statistics.word import BAND, Word, p_of_word, word_of

ENOUGH_ROWS = 256
"""Held-out rows needed for a useful interval."""
ENOUGH_SEEDS = 3
"""Orders of the data from which an interval can tell what another order would give."""
IN_WORDS: Mapping[Word, str] = {
    "matches": "no loss",
    "behind": "worse",
    "ahead": "better",
    "cannot tell": "cannot tell",
}


@dataclass(frozen=True)
class Comparison:
    """A larger batch, or rank, against a smaller one on the same held-out rows.

    Args:
        small: Rows per step of the smaller batch, or the smaller rank.
        large: Rows per step of the larger batch, or the larger rank.
        difference: Mean loss of the larger minus that of the smaller, nats; positive where the larger has learnt less.
        error: Standard error of ``difference``, nats.
        freedom: Degrees of freedom of ``error``.
        word: Whether the larger "matches" the smaller within 0.005 nats, is "behind" or "ahead", or "cannot tell".
    """

    small: int
    large: int
    difference: float
    error: float
    freedom: float
    word: Word

    @classmethod
    def of(cls, small: int, large: int, differences: Tensor) -> Comparison:
        """Compare from the differences ``(seeds, rows)``, both taken as random (`paired_interval`).

        With one seed the interval is over rows only: it does not contain what another order of the data would give.
        """
        found = paired_interval(differences.double().numpy())
        return cls(small, large, found.mean, found.error, found.freedom, word_of(found))

    @property
    def interval(self) -> Interval:
        """The difference with its interval."""
        return Interval(self.difference, self.error, self.freedom)

    @property
    def is_worse(self) -> bool:
        """Whether the larger falls behind."""
        return self.word == "behind"

    @property
    def is_harmless(self) -> bool:
        """Whether the larger matches the smaller, or is ahead."""
        return self.word in ("matches", "ahead")

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Comparison:
        """The comparison that `dataclasses.asdict` made this mapping of.

        Raises:
            ValueError: If the word is none.
        """
        if found["word"] not in get_args(Word):
            raise ValueError(f"word {found['word']!r}")
        difference, error, freedom = (float(found[name]) for name in ("difference", "error", "freedom"))
        return cls(int(found["small"]), int(found["large"]), difference, error, freedom, found["word"])

    def __str__(self) -> str:
        return f"{self.difference:+.4f} ({self.interval.low:+.4f} to {self.interval.high:+.4f}) nats"


def compared(losses: Mapping[int, Tensor]) -> tuple[Comparison, ...]:
    """Compare every pair of batches, from the losses ``(seeds, rows)`` of each, and correct for their number."""
    pairs = [(small, large) for small in losses for large in losses if small < large]
    return corrected([Comparison.of(small, large, losses[large] - losses[small]) for small, large in pairs])


def corrected(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """The comparisons with Holm's correction: a word that does not stand among so many becomes "cannot tell"."""
    p_values = holm([p_of_word(each.interval, BAND) for each in comparisons])
    return tuple(
        each if p <= ALPHA else replace(each, word="cannot tell") for each, p in zip(comparisons, p_values, strict=True)
    )
