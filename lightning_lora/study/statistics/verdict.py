"""The verdict about one arm, and its sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_lora.study.statistics.interval import Interval
from lightning_lora.study.statistics.steps_to_loss import StepsToLoss
from lightning_lora.study.statistics.word import Word


@dataclass(frozen=True)
class Verdict:
    """What is said of an arm against its baseline, and on what it rests.

    Args:
        band: Nats that count as equal, fixed before the start.
        interval: Mean difference with its interval; None if no seed is finished in both arms.
        seeds: Seeds that the interval is taken from.
        spread: Standard deviation over seeds of the paired difference, nats; None with fewer than two seeds.
        reason: Why nobody can tell, or what else the word rests on.
        p: P-value of the word before a correction for several comparisons; None where no test decided.
        p_corrected: The same after `corrected`.
        is_open: Whether more seeds could change "cannot tell" into another word.
        after_tokens: Training tokens from which the arm stays behind (`stays_behind_after`).
        worst: The seed of the arm with the highest loss, and that loss; NaN if it diverged. None without runs.
        baseline_worst: The same of the baseline.
        steps: Steps to the loss at which most of the baseline's gain is reached; None if it was not looked at.
    """

    arm: str
    baseline: str
    verdict: Word
    band: float
    interval: Interval | None = None
    seeds: int = 0
    spread: float | None = None
    reason: str = ""
    p: float | None = None
    p_corrected: float | None = None
    is_open: bool = False
    after_tokens: float | None = None
    worst: tuple[int, float] | None = None
    baseline_worst: tuple[int, float] | None = None
    steps: StepsToLoss | None = None

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        if self.verdict == "cannot tell":
            return f"cannot tell{'' if self.reason.startswith('(') else ':'} {self.reason}"
        both = f"{self.arm} {'is ahead of' if self.verdict == 'ahead' else _VERBS[self.verdict]} {self.baseline}"
        if self.verdict == "matches":
            return f"{both} within {self.band:g} nats{self._slightly()}"
        if self.p is None or self.interval is None:
            return f"{both}: {self.reason}"
        size = nats(abs(self.interval.mean), self.band)
        after = "" if self.after_tokens is None else f" after {self.after_tokens:,.0f} tokens"
        return f"{both} by {size} nats ({self._ends()}){after}{self.reason and f'; {self.reason}'}"

    @property
    def headline(self) -> str:
        """The sentence with the names of both arms in every case."""
        if self.verdict != "cannot tell":
            return self.sentence
        return f"{self.arm} against {self.baseline}: {self.sentence}"

    def to_dict(self) -> dict[str, Any]:
        """What ``verdicts.json`` holds of it: plain values, None where there is no number."""
        ends = self.interval
        return {
            "arm": self.arm,
            "baseline": self.baseline,
            "verdict": self.verdict,
            "difference": None if ends is None else ends.mean,
            "low": None if ends is None else _finite(ends.low),
            "high": None if ends is None else _finite(ends.high),
            "seeds": self.seeds,
            "sentence": self.sentence,
            "band": self.band,
            "alpha": None if ends is None else ends.alpha,
            "spread": self.spread,
            "inside_band": None if ends is None else ends.inside(self.band),
            "p": self.p,
            "p_corrected": self.p_corrected,
            "after_tokens": self.after_tokens,
            "worst": _seed(self.worst),
            "baseline_worst": _seed(self.baseline_worst),
            "steps_to_loss": None if self.steps is None else self.steps.to_dict(),
        }

    def _slightly(self) -> str:
        """A difference inside of the band that is sure not to be zero."""
        ends = self.interval
        if ends is None or ends.low <= 0 <= ends.high:
            return ""
        side = "behind" if ends.low > 0 else "ahead"
        return f", slightly {side}: {nats(abs(ends.mean), self.band)} ({self._ends()})"

    def _ends(self) -> str:
        """Both ends, as the size of the difference that the sentence names."""
        assert self.interval is not None
        ends = self.interval.low, self.interval.high
        if self.interval.mean < 0:
            ends = -ends[1], -ends[0]
        return f"{nats(ends[0], self.band)} to {nats(ends[1], self.band)}"


_VERBS = {"matches": "matches", "behind": "falls behind"}


def nats(value: float, band: float) -> str:
    """``value`` with four decimals, or with as many as two digits of the band need."""
    return f"{value:.{max(4, 1 - math.floor(math.log10(band)))}f}"


def _seed(worst: tuple[int, float] | None) -> dict[str, Any] | None:
    return None if worst is None else {"seed": worst[0], "loss": _finite(worst[1])}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
