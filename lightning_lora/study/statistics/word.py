"""The word for an interval: it matches, falls behind, is ahead, or nobody can tell.

``band`` is the difference that counts as none. It is fixed before the start and never grows with the noise: more noise
widens the interval, and leads to "cannot tell". That the interval lies inside of the band is the same as two one-sided
tests at level ``alpha`` (Schuirmann 1987).
"""

from __future__ import annotations

import math
from typing import Literal

from lightning_lora.errors import StatisticsError
from lightning_lora.study.statistics.interval import Interval

Word = Literal["matches", "behind", "ahead", "cannot tell"]
BAND = 0.005
"""Nats per supervised token that count as no difference: 0.5 % of perplexity."""
MIN_SEEDS = 3
"""Seeds needed for a verdict: two seeds have a half-width of 4.5 times their spread."""


def word_of(interval: Interval, band: float = BAND) -> Word:
    """The word, the first that applies: matches, behind, ahead, cannot tell."""
    if interval.low > -band and interval.high < band:
        return "matches"
    if interval.low > 0:
        return "behind"
    return "ahead" if interval.high < 0 else "cannot tell"


def p_of_word(interval: Interval, band: float = BAND) -> float:
    """The p-value of the claim that the word makes; for "cannot tell" that of the claim it is nearest to."""
    p_values = {"matches": interval.p_equal(band), "behind": interval.p_behind, "ahead": interval.p_ahead}
    word = word_of(interval, band)
    return min(p_values.values()) if word == "cannot tell" else p_values[word]


def check_band(band: float) -> None:
    """Refuse a band that is not a positive number.

    Raises:
        ConfigError: If it is not.
    """
    if not 0 < band < math.inf:
        raise StatisticsError(f"band must be a positive number of nats that count as equal, got {band}.")
