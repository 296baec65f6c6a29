"""Takes finished studies into docs/findings: their files, a picture, and the tables of their pages.

    PYTHONPATH=. python studies/write_findings.py            # all pages, from the committed files
    PYTHONPATH=. python studies/write_findings.py NAME ...   # first takes runs/NAME over

A page ``docs/findings/NAME.md`` has tables between ``<!-- table: KIND -->`` and ``<!-- end -->``, made from the folder
``docs/findings/NAME`` alone; ``<!-- table: KIND OTHER -->`` takes another folder.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_lora.files.atomic import atomic_file
from lightning_lora.study.matched.record import CHOICES, RESULTS, STUDY, VERDICTS, StudyRecord, read_study
from lightning_lora.study.report.write import HTML, write_report
from lightning_lora.study.statistics.arm import Arm
from lightning_lora.study.statistics.batch_penalty import batch_penalty
from studies import early_curves, learning_rates
from studies.modules import reward_curves
from studies.modules.pages import FINDINGS, read_lines, save_figure, write_lines
from studies.modules.pair_accuracy import ACCURACY, accuracy_lines, accuracy_table, is_of_pairs
from studies.modules.tables import (
    CURVES,
    PENALTY,
    bits_table,
    curve_table,
    lines_table,
    losses_of,
    multiplier,
    penalty_table,
    public_table,
    rollouts_table,
    study_table,
    sweep_table,
)

TABLES: dict[str, Callable[[Path], str]] = {
    "study": study_table,
    "bits": bits_table,
    "sweep": sweep_table,
    "curve": curve_table,
    "penalty": penalty_table,
    "accuracy": accuracy_table,
    "lines": lines_table,
    "early": lambda folder: early_curves.table(early_curves.mean_curves(read_lines(folder / RESULTS))),
    "rates": lambda folder: learning_rates.table(read_lines(folder / RESULTS)),
    "rewards": lambda folder: reward_curves.runs_table(read_lines(folder / RESULTS)),
    "gaps": lambda folder: reward_curves.gaps_table(read_lines(folder / RESULTS)),
    "controls": lambda folder: reward_curves.controls_table(read_lines(folder / RESULTS)),
    "shuffled": lambda folder: reward_curves.shuffled_table(read_lines(folder / RESULTS)),
    "rollouts": rollouts_table,
    "public": public_table,
    "norms": lambda folder: learning_rates.norms_table(read_lines(folder / RESULTS)),
}
_BLOCK = re.compile(r"(<!-- table: (\w+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, name: str) -> str:
    """A page whose tables are made anew from the committed files."""

    def made(found: re.Match[str]) -> str:
        folder = FINDINGS / (found[3] or name)
        return f"{found[1]}\n{TABLES[found[2]](folder)}\n\n{found[4]}"

    return _BLOCK.sub(made, text)


def take_over(source: Path) -> None:
    """Copy the files of a finished study, and write its report, its picture and its batch penalty."""
    record, target = read_study(source), FINDINGS / source.name
    target.mkdir(parents=True, exist_ok=True)
    for name in (STUDY, RESULTS, CHOICES, VERDICTS):
        shutil.copyfile(source / name, target / name)
    write_report(source)
    shutil.copyfile(source / HTML, target / HTML)
    curves = [
        {"arm": cell.arm, "seed": cell.seed, "step": point.step, "val_loss": point.val_loss}
        for cell in record.cells
        if cell.phase == "verdict"
        for point in record.curve(cell)
        if point.val_loss is not None
    ]
    if curves:
        write_lines(target / CURVES, curves)
    if is_of_pairs(record):
        write_lines(target / ACCURACY, accuracy_lines({arm.name: arm_of(record, arm.name) for arm in record.arms}))
    draw(record, target / "losses.png")
    if found := penalties(record):
        with atomic_file(target / PENALTY) as file:
            file.write((json.dumps(found, indent=2) + "\n").encode())


def draw(record: StudyRecord, path: Path) -> None:
    """The sweeps on the left, the seeds of the verdict on the right."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    sweeps, seeds = figure.subplots(1, 2)
    for place, arm in enumerate(record.arms):
        cells = sorted(record.cells_of(arm.name, "selection"), key=lambda cell: cell.learning_rate)
        done = [(cell.learning_rate * multiplier(arm), cell.loss) for cell in cells if cell.loss is not None]
        sweeps.plot(*zip(*done, strict=True), marker="o", label=arm.name) if done else None
        losses = losses_of(record, arm.name)
        seeds.plot([place] * len(losses), losses, "o", alpha=0.7)
    sweeps.set_xscale("log")
    sweeps.set_xlabel("rate of Adam")
    sweeps.set_ylabel("nats a token")
    sweeps.legend(frameon=False, fontsize=8)
    seeds.set_xticks(range(len(record.arms)), [arm.name for arm in record.arms], rotation=20, ha="right", fontsize=8)
    seeds.set_ylabel("nats a token, each seed")
    for axes in (sweeps, seeds):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def penalties(record: StudyRecord) -> list[dict[str, Any]]:
    """The batch penalty of each LoRA arm, in a study whose arms are named ``METHOD, batch NUMBER``."""
    named = [re.fullmatch(r"(.+), batch (\d+)", arm.name) for arm in record.arms]
    if not all(named):
        return []
    sizes = sorted({int(found[2]) for found in named if found})
    methods = dict.fromkeys(found[1] for found in named if found)
    full = record.baseline.partition(",")[0]

    def pair(method: str, size: int) -> tuple[Arm, Arm]:
        return arm_of(record, f"{method}, batch {size}"), arm_of(record, f"{full}, batch {size}")

    return [
        batch_penalty(pair(method, size), pair(method, sizes[0])).to_dict()
        | {"arm": f"{method}, {size} against {sizes[0]}"}
        for method in methods
        if method != full
        for size in sizes[1:]
    ]


def arm_of(record: StudyRecord, name: str) -> Arm:
    """The verdict runs of an arm, row by row; all rows of these tasks have the same number of tokens."""
    losses, failed = {}, {}
    for cell in record.cells_of(name, "verdict"):
        rows = record.row_losses(cell) if cell.state == "done" else None
        if rows is None:
            failed[cell.seed] = cell.reason or cell.state
            continue
        chosen = rows.rows_of("verdict")
        losses[cell.seed] = (rows.loss_sum[chosen] / rows.tokens[chosen]).numpy()
    problem = next(arm.problem for arm in record.arms if arm.name == name)
    base = record.base_loss("verdict")
    return Arm(name, losses, failed, float("inf") if base is None else base, problem)


def main() -> None:
    """Take the named studies over, and fill all pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="studies in runs to take over")
    for name in parser.parse_args().names:
        take_over(Path("runs", name))
    for page in sorted(FINDINGS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        with atomic_file(page) as file:
            file.write(filled(text, page.stem).encode())


if __name__ == "__main__":
    main()
