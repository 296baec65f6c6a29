"""The verdict about one arm of a study, from the row losses of its runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lightning_lora.study.matched.cells import Cell, CellStatus
from lightning_lora.study.matched.spec import StudySpec
from lightning_lora.study.statistics.arm import Arm
from lightning_lora.study.statistics.compare import compare
from lightning_lora.study.statistics.rates.sweep import NextStep
from lightning_lora.study.statistics.verdict import Verdict


def judge(
    spec: StudySpec,
    name: str,
    seeds: Sequence[int],
    choices: Mapping[str, NextStep],
    cells: Iterable[Cell],
    known: Mapping[str, CellStatus],
) -> Verdict:
    """Compare an arm with the baseline on the seeds that are over.

    Args:
        spec: The study.
        name: Name of the arm.
        seeds: The seeds planned up to now.
        choices: Arm to what its sweep has chosen.
        cells: The runs asked for.
        known: What is known of them, by key.
    """
    runs = [known[cell.key] for cell in cells if cell.phase == "verdict" and cell.key in known and cell.seed in seeds]
    base = next((known[cell.key].loss for cell in cells if cell.phase == "base" and cell.key in known), None)
    arms = [_arm(each, runs, choices[each].problem, base) for each in (name, spec.baseline)]
    tokens = next((tokens_of(run) for run in runs if run.outcome is not None), None)
    hashes = {run.outcome.rows_hash for run in runs if run.outcome is not None}
    unequal = "held-out rows" if len(hashes) > 1 else ""
    if unequal:
        arms, tokens = [replace(arm, losses={seed: math.nan for seed in arm.losses}) for arm in arms], None
    return compare(*arms, band=spec.band, alpha=spec.plan.alpha, seeds=seeds, tokens=tokens, unequal=unequal)


def tokens_of(run: CellStatus) -> np.ndarray:
    """``(rows,)`` supervised tokens of the verdict rows that have any."""
    assert run.outcome is not None
    tokens = run.outcome.rows.tokens[run.outcome.rows.rows_of("verdict")].numpy()
    return tokens[tokens > 0]


def _arm(name: str, runs: Iterable[CellStatus], problem: str, base_loss: float | None) -> Arm:
    losses, failed = {}, {}
    for run in runs:
        if run.cell.arm != name:
            continue
        if run.outcome is not None:
            rows = run.outcome.rows
            chosen = rows.rows_of("verdict") & (rows.tokens > 0)
            losses[run.cell.seed] = (rows.loss_sum[chosen] / rows.tokens[chosen]).numpy()
        elif run.diverged:
            losses[run.cell.seed] = math.nan
        else:
            failed[run.cell.seed] = run.reason
    return Arm(name, losses, failed, math.inf if base_loss is None else base_loss, problem)
