"""Compares an arm with its baseline, seed by seed and row by row, and finds the verdict.

The rules apply in this order. Arms that differ in what must be equal, a learning rate at the edge of its sweep, fewer
than three seeds, a missing run: cannot tell. A seed that diverged: never "matches"; in more than half of the seeds:
falls behind. Else the word of the interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_lora.errors import ResultFileError
from lightning_lora.study.statistics.arm import Arm
from lightning_lora.study.statistics.crossed import linearised, paired_interval
from lightning_lora.study.statistics.holm import holm
from lightning_lora.study.statistics.interval import ALPHA, Interval
from lightning_lora.study.statistics.needed import rows_needed, seeds_needed
from lightning_lora.study.statistics.verdict import Verdict
from lightning_lora.study.statistics.word import BAND, MIN_SEEDS, Word, check_band, p_of_word, word_of


def compare(
    arm: Arm,
    baseline: Arm,
    *,
    band: float = BAND,
    alpha: float = ALPHA,
    seeds: Iterable[int] | None = None,
    tokens: ArrayLike | None = None,
    unequal: str = "",
) -> Verdict:
    """Find the verdict about ``arm``.

    Args:
        arm: The arm.
        baseline: What it is compared with, on the same seeds and rows.
        band: Nats that count as equal. Fix it before the start.
        alpha: One-sided level of the interval (`SeedPlan.alpha`).
        seeds: The seeds that were planned up to now. None: all that either arm has.
        tokens: ``(rows,)`` supervised tokens of the verdict rows. None: every row counts the same.
        unequal: In what the arms differ that must be equal, such as "precision".

    Raises:
        ConfigError: If the band is not a positive number.
        DataError: If the arms were scored on different rows.
    """
    check_band(band)
    planned = sorted({*arm.losses, *arm.failed, *baseline.losses, *baseline.failed} if seeds is None else set(seeds))
    ours, theirs = ([seed for seed in each.diverged(tokens) if seed in planned] for each in (arm, baseline))
    both = [seed for seed in planned if seed in arm.losses and seed in baseline.losses]
    stable = [seed for seed in both if seed not in ours + theirs]
    evidence = _Evidence.of(differences(arm, baseline, stable), tokens, alpha) if stable else None
    worst = arm.worst(tokens), baseline.worst(tokens)
    verdict = Verdict(
        arm.name, baseline.name, "cannot tell", band, seeds=len(stable), worst=worst[0], baseline_worst=worst[1]
    )
    if evidence is not None:
        verdict = replace(verdict, interval=evidence.interval, spread=evidence.spread)
    if reason := _no_verdict(arm, baseline, planned, unequal):
        return replace(verdict, reason=reason)
    if theirs:
        return replace(verdict, reason=f"{baseline.name} {_unstable(theirs, planned)}")
    if ours:
        return _of_unstable(verdict, ours, planned)
    assert evidence is not None
    word, p = word_of(evidence.interval, band), p_of_word(evidence.interval, band)
    if word == "cannot tell":
        return replace(verdict, p=p, reason=evidence.what_would_do(band), is_open=True)
    return replace(verdict, verdict=word, p=p)


def differences(arm: Arm, baseline: Arm, seeds: Sequence[int]) -> NDArray[np.float64]:
    """Arm minus baseline: ``(seeds, rows)``, or ``(seeds,)`` where there is one number for all rows.

    Raises:
        DataError: If the rows of two runs differ in number.
    """
    counts = {len(each.rows(seed)) for seed in seeds for each in (arm, baseline)}
    if len(counts) > 1:
        raise ResultFileError(
            f"{arm.name} and {baseline.name} were scored on different numbers of rows ({sorted(counts)}): arms are "
            f"compared on the same rows."
        )
    found = np.stack([arm.rows(seed) - baseline.rows(seed) for seed in seeds])
    return found[:, 0] if counts == {1} else found


def corrected(verdicts: Sequence[Verdict], primary: str | None = None) -> list[Verdict]:
    """Correct for the number of comparisons, by Holm; a word that does not stand becomes "cannot tell".

    Args:
        primary: Name of the arm of the one comparison that was named before the start; its level is not corrected.
    """
    further = {
        place: verdict.p for place, verdict in enumerate(verdicts) if verdict.arm != primary and verdict.p is not None
    }
    p_values = dict(zip(further, holm(list(further.values())), strict=True))
    return [
        _stands(verdict, p_values[place], len(further)) if place in further else verdict
        for place, verdict in enumerate(verdicts)
    ]


# What a word that does not stand among several comparisons would be.
_ALONE: dict[Word, str] = {"matches": "it would match", "behind": "it would be behind", "ahead": "it would be ahead"}


def _stands(verdict: Verdict, p: float, count: int) -> Verdict:
    verdict = replace(verdict, p_corrected=p)
    assert verdict.interval is not None
    if verdict.verdict == "cannot tell" or p <= verdict.interval.alpha:
        return verdict
    reason = f"({count} comparisons): {_ALONE[verdict.verdict]} as the only comparison, more seeds may tell"
    return replace(verdict, verdict="cannot tell", reason=reason, is_open=True)


@dataclass(frozen=True)
class _Evidence:
    """An interval, and the spreads that it comes from."""

    interval: Interval
    num_seeds: int
    num_rows: int
    spread: float | None
    row_spread: float

    @classmethod
    def of(cls, found: NDArray[np.float64], tokens: ArrayLike | None, alpha: float) -> _Evidence:
        values = linearised(found, tokens) if found.ndim == 2 else found[:, None]
        num_seeds, num_rows = values.shape
        spread = float(values.mean(1).std(ddof=1)) if num_seeds > 1 else None
        row_spread = float(values.mean(0).std(ddof=1)) if num_rows > 1 else 0.0
        return cls(paired_interval(found, tokens, alpha=alpha), num_seeds, num_rows, spread, row_spread)

    def what_would_do(self, band: float) -> str:
        """How many seeds, or rows, would do if the spreads stay."""
        room, alpha = band - abs(self.interval.mean), self.interval.alpha
        if room <= 0:
            return f"{self.num_seeds} seeds; the difference is as large as the band"
        assert self.spread is not None
        count = seeds_needed(self.spread, room, alpha)
        rows = rows_needed(self.row_spread, room, alpha)
        assert count is not None
        if rows <= self.num_rows:
            return f"{self.num_seeds} seeds; {max(count, self.num_seeds + 1):,} would do if the spread stays"
        if count <= self.num_seeds:
            return f"{self.num_seeds} seeds and {self.num_rows:,} rows; {rows:,} rows would do if the spread stays"
        return (
            f"{self.num_seeds} seeds and {self.num_rows:,} rows; {count:,} seeds and {rows:,} rows would do if the "
            f"spread stays"
        )


def _no_verdict(arm: Arm, baseline: Arm, planned: Sequence[int], unequal: str) -> str:
    """Why there is no verdict whatever the numbers are; "" if there is one."""
    if unequal:
        return f"the arms differ in {unequal}"
    for each in (arm, baseline):
        if each.problem:
            return f"{each.problem} ({each.name})"
    if len(planned) < MIN_SEEDS:
        return f"{len(planned)} {'seed' if len(planned) == 1 else 'seeds'}; at least {MIN_SEEDS} are needed"
    for each in (arm, baseline):
        if missing := [seed for seed in planned if seed not in each.losses]:
            reasons = "; ".join(dict.fromkeys(each.failed.get(seed, "not run") for seed in missing))
            seeds = f"seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            return f"{each.name} has no result for {seeds} ({reasons})"
    return ""


def _of_unstable(verdict: Verdict, diverged: Sequence[int], planned: Sequence[int]) -> Verdict:
    """The verdict about an arm of which some seeds diverged: never "matches", and never ahead."""
    reason = _unstable(diverged, planned)
    if 2 * len(diverged) > len(planned):
        return replace(verdict, verdict="behind", reason=reason)
    if verdict.interval is not None and verdict.seeds >= MIN_SEEDS and verdict.interval.low > 0:
        return replace(verdict, verdict="behind", reason=f"unstable: {reason}", p=verdict.interval.p_behind)
    return replace(verdict, reason=f"unstable: {reason}")


def _unstable(diverged: Sequence[int], planned: Sequence[int]) -> str:
    return f"diverged in {len(diverged)} of {len(planned)} seeds at its best rate"
