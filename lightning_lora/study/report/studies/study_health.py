"""What went wrong in a study: failed runs with their reasons, diverged seeds, runs that were begun again."""

from __future__ import annotations

import math

from lightning_lora.study.matched.record import CellRecord
from lightning_lora.study.report.content import Block, Section, Table, Words, said
from lightning_lora.study.report.numbers import count, nats, rate, words
from lightning_lora.study.report.studies.study_facts import StudyFacts


def study_health(facts: StudyFacts) -> Section:
    """A line for each run that is not as it should be."""
    cells = [cell for cell in facts.study.cells if _trouble(facts, cell)]
    cells.sort(key=lambda cell: (cell.state != "failed", cell.state != "pruned"))
    if not cells:
        return Section("failed", "Health", [Words("No run failed, diverged, or had to be begun again.")])
    rows = [
        [
            words(cell.arm),
            words(cell.phase),
            rate(cell.learning_rate),
            count(cell.seed),
            words(_trouble(facts, cell)),
            nats(cell.loss),
            count(cell.attempt),
            words(cell.reason or "-"),
        ]
        for cell in cells
    ]
    columns = ["arm", "phase", "rate", "seed", "what", "loss", "attempts", "reason"]
    note = "A rate that diverged counts as worse than all others and closes its side of the sweep."
    blocks: list[Block] = [Table("failed-runs", "Runs that are not as they should be", columns, rows, note)]
    if any(cell.phase == "verdict" for cell in cells if cell.state == "failed" or _diverged(facts, cell)):
        blocks.append(
            said(
                "An arm that fails in {one} of {five} seeds shows it in half of the studies with {three} seeds.",
                one=count(1),
                five=count(5),
                three=count(3),
            )
        )
    return Section("failed", "Health", blocks)


def _trouble(facts: StudyFacts, cell: CellRecord) -> str:
    if cell.state == "failed":
        return "failed"
    if cell.state == "pruned":
        return "given up early by successive halving"
    if cell.state == "done" and _diverged(facts, cell):
        return "diverged"
    return "begun again" if cell.attempt > 1 else ""


def _diverged(facts: StudyFacts, cell: CellRecord) -> bool:
    if cell.loss is None or cell.phase == "base":
        return False
    base = facts.base_losses.get("selection" if cell.phase == "selection" else "verdict", math.inf)
    return not math.isfinite(cell.loss) or cell.loss > base
