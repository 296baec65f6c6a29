"""The verdict about one arm of a study, from the row losses of its runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lightning_lora.study.matched.cells import Cell, CellStatus
from lightning_lora.study.matched.judging.further import Further, noise_floor, penalty
from lightning_lora.study.matched.judging.learning_curves import done_runs, target_of, with_curves
from lightning_lora.study.matched.record import Phase
from lightning_lora.study.matched.spec import StudySpec
from lightning_lora.study.statistics.arm import Arm
from lightning_lora.study.statistics.compare import compare
from lightning_lora.study.statistics.rates.sweep import NextStep
from lightning_lora.study.statistics.verdict import Verdict


class Judge:
    """Judges the runs of a study that are over.

    Args:
        choices: Arm to what its sweep has chosen.
        known: What is known of them, by key.
    """

    def __init__(
        self,
        spec: StudySpec,
        choices: Mapping[str, NextStep],
        cells: Iterable[Cell],
        known: Mapping[str, CellStatus],
    ) -> None:
        self.spec = spec
        self.choices = choices
        self.runs = [known.get(cell.key, CellStatus(cell, "ready")) for cell in cells]
        base = next((run for run in self.runs if run.cell.phase == "base"), None)
        self.base = None if base is None else base.outcome
        judged = [run.outcome for run in self.runs if run.cell.phase in ("verdict", "aa") and run.outcome is not None]
        self.has_equal_rows = len({outcome.rows_hash for outcome in judged}) < 2
        rows = judged[0].rows if judged and self.has_equal_rows else None
        tokens = None if rows is None else rows.tokens[rows.rows_of("verdict")].numpy()
        self.tokens = None if tokens is None else tokens[tokens > 0]

    def verdict(self, name: str, seeds: Sequence[int]) -> Verdict:
        """Compare an arm with the baseline on the seeds planned up to now."""
        return compare(
            self.arm(name, seeds),
            self.arm(self.spec.baseline, seeds),
            band=self.spec.band,
            alpha=self.spec.plan.alpha,
            seeds=seeds,
            tokens=self.tokens,
            unequal="" if self.has_equal_rows else "held-out rows",
        )

    def with_curves(self, verdict: Verdict) -> Verdict:
        """The verdict with what the evaluations of its runs tell."""
        baseline = self.spec.baseline
        best = [
            run.outcome
            for run in self.runs
            if run.cell.arm == baseline
            and run.cell.phase == "selection"
            and run.cell.learning_rate == self.choices[baseline].chosen
            and run.outcome is not None
        ]
        arm, full = (done_runs(self.runs, name) for name in (verdict.arm, baseline))
        return with_curves(verdict, arm, full, target_of(self.base, best), self.spec.plan.alpha)

    def penalty(self, seeds: Sequence[int]) -> Verdict:
        """Whether the large batch costs adapters more, on the seeds planned up to now."""
        return penalty(self.spec, lambda name: self.arm(name, seeds), seeds, self.tokens)

    def further(self, of_batches: Verdict | None) -> Further:
        """The noise floor, if its runs are over, beside what is found of batches."""
        full, aa_seeds = self.spec.baseline, self.spec.aa_seeds
        seeds = self.spec.verdict_seeds(len(aa_seeds))
        both = [
            run
            for run in self.runs
            if run.cell.phase == "aa"
            or (run.cell.phase == "verdict" and run.cell.arm == full and run.cell.seed in seeds)
        ]
        if not aa_seeds or not both or not all(run.is_over for run in both):
            return Further(batch_penalty=of_batches)
        return Further(
            *noise_floor(self.spec, self.arm(full, seeds), self.arm(full, aa_seeds, "aa"), self.tokens), of_batches
        )

    def arm(self, name: str, seeds: Sequence[int], phase: Phase = "verdict") -> Arm:
        """The runs of an arm, for the statistics."""
        base_loss = math.inf if self.base is None else self.base.rows.mean("verdict")
        losses, failed = {}, {}
        for run in self.runs:
            if run.cell.arm != name or run.cell.phase != phase or run.cell.seed not in seeds:
                continue
            if run.outcome is not None:
                rows = run.outcome.rows
                chosen = rows.rows_of("verdict") & (rows.tokens > 0)
                losses[run.cell.seed] = (rows.loss_sum[chosen] / rows.tokens[chosen]).numpy()
            elif run.diverged:
                losses[run.cell.seed] = math.nan
            elif run.is_over:
                failed[run.cell.seed] = run.reason
        if not self.has_equal_rows:
            losses = dict.fromkeys(losses, math.nan)
        return Arm(name, losses, failed, base_loss, self.choices[name].problem)
