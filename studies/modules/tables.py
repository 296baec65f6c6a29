"""Tables of a page of findings, made from the files that are committed beside it and from nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_lora.study.matched.options import option_of
from lightning_lora.study.matched.record import ArmRecord, StudyRecord, read_study
from studies.modules.pages import markdown_table, read_lines
from studies.modules.rows import BITS, VALUE

PENALTY, CURVES, PUBLIC = "batch_penalty.json", "curves.csv", "public.csv"
ANSWERS = 64
"""Answers of a rollout in the runs of `rollouts_table`: 8 prompts, 8 each."""


def study_table(folder: Path) -> str:
    """A line for each arm: its size, its rate, its losses, and what is found."""
    record = read_study(folder)
    found = {verdict["arm"]: verdict for verdict in record.verdicts}
    rows = [_study_row(record, arm, found.get(arm.name)) for arm in record.arms]
    columns = ("arm", "parameters", "rate of Adam", "loss, mean of seeds", "each seed", "difference (90 % interval)")
    verdicts = "\n".join(f"- {verdict['arm']}: {verdict['sentence']}" for verdict in record.verdicts)
    return f"{markdown_table(columns, rows)}\n\n{verdicts}"


def bits_table(folder: Path) -> str:
    """A line for each arm: how many bits of the facts it has stored, by the mean loss of its seeds."""
    record = read_study(folder)
    num_facts = int(option_of(record.arms[0].config, "data.init_args.num_rows"))
    rows = []
    for arm in record.arms:
        losses, size = losses_of(record, arm.name), _size(record, arm.name)
        if not losses or not size:
            continue
        stored = num_facts * (BITS - VALUE * fmean(losses) / math.log(2))
        share = f"{stored / (num_facts * BITS):.1%}"
        rows.append((arm.name, f"{size / (num_facts * BITS):.2f}", f"{stored:,.0f}", share, f"{stored / size:.3f}"))
    return markdown_table(("arm", "parameters a bit", "bits stored", "share", "bits a parameter"), rows)


def sweep_table(folder: Path) -> str:
    """A line for each arm: the loss at each rate of its sweep, and which was chosen."""
    record = read_study(folder)
    rows = []
    for arm in record.arms:
        cells = sorted(record.cells_of(arm.name, "selection"), key=lambda cell: cell.learning_rate)
        texts = [
            f"{'**' if cell.learning_rate == arm.chosen_rate else ''}{cell.learning_rate * multiplier(arm):.2g}: "
            f"{'failed' if cell.loss is None else f'{cell.loss:.4f}'}"
            f"{'**' if cell.learning_rate == arm.chosen_rate else ''}"
            for cell in cells
        ]
        rows.append((arm.name, ", ".join(texts), arm.problem or "interior"))
    return markdown_table(("arm", "rate of Adam: loss on the selection rows", "best rate"), rows)


def curve_table(folder: Path) -> str:
    """A line for each arm: its validation loss after so many steps, the mean of its verdict seeds."""
    lines = read_lines(folder / CURVES)
    steps = sorted({int(line["step"]) for line in lines})
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        of_arm = [line for line in lines if line["arm"] == arm]
        means = [fmean(float(line["val_loss"]) for line in of_arm if int(line["step"]) == step) for step in steps]
        rows.append((arm, *(f"{mean:.3f}" for mean in means)))
    return markdown_table(("arm", *(f"step {step}" for step in steps)), rows)


def penalty_table(folder: Path) -> str:
    """The difference of differences of each LoRA arm."""
    rows = [
        (each["arm"], f"{each['difference']:+.4f}", f"{each['low']:+.4f} to {each['high']:+.4f}", each["verdict"])
        for each in json.loads((folder / PENALTY).read_text(encoding="utf-8"))
    ]
    return markdown_table(
        ("arm", "loses more by the large batch than full, nats", "90 % interval", "the gap of LoRA is"), rows
    )


def lines_table(folder: Path) -> str:
    """The CSV file of a script as it is, with numbers in four digits."""
    lines = read_lines(folder / "results.csv")
    return markdown_table(list(lines[0]), [[_short(text) for text in line.values()] for line in lines])


def rollouts_table(folder: Path) -> str:
    """A line for each run of ``lightning-lora fit`` with rewards: the answers that were right, early and late."""
    lines = read_lines(folder / "results.csv")
    rows = []
    for run in dict.fromkeys(line["run"] for line in lines):
        mine = [line for line in lines if line["run"] == run]
        rewards = [float(line["reward"]) for line in mine]
        halves = rewards[: len(mine) // 2], rewards[len(mine) // 2 :]
        shares = [fmean(half) for half in halves]
        variances = [p * (1 - p) / (len(half) * ANSWERS) for p, half in zip(shares, halves, strict=True)]
        means = [fmean(float(line[name]) for line in mine) for name in ("constant_groups", "truncated", "entropy")]
        change = f"{shares[1] - shares[0]:+.4f} (s.e. {math.sqrt(sum(variances)):.4f})"
        counts = [f"{sum(half) * ANSWERS:.0f} of {len(half) * ANSWERS:,}" for half in halves]
        bits = f"{float(mine[-1]['information_bits']) / int(mine[-1]['trained']):.4f}"
        constant, cut, entropy = means
        rows.append((run, len(mine), *counts, change, f"{constant:.1%}", f"{cut:.1%}", f"{entropy:.3f}", bits))
    columns = ("model", "rollouts", "right, first half", "right, second half", "change of the share")
    more = ("groups all alike", "answers cut off", "entropy, nats a token", "bits a parameter")
    return markdown_table((*columns, *more), rows)


def public_table(folder: Path) -> str:
    """What others have published on the same question, word for word."""
    lines = read_lines(folder / PUBLIC)
    return markdown_table(list(lines[0]), [list(line.values()) for line in lines])


def losses_of(record: StudyRecord, arm: str) -> list[float]:
    """The losses of the verdict runs of an arm that are done, in the order of seeds."""
    cells = sorted(record.cells_of(arm, "verdict"), key=lambda cell: cell.seed)
    return [cell.loss for cell in cells if cell.loss is not None]


def multiplier(arm: ArmRecord) -> float:
    """How many times the rate of full fine-tuning the arm trains at."""
    lora = option_of(arm.config, "model.init_args.lora")
    return float(lora["lr_multiplier"]) if lora else 1.0


def _study_row(record: StudyRecord, arm: ArmRecord, verdict: Any) -> Sequence[str]:
    losses, size = losses_of(record, arm.name), _size(record, arm.name)
    rate = "none" if arm.chosen_rate is None else f"{arm.chosen_rate * multiplier(arm):.2g}"
    gap = "baseline" if arm.name == record.baseline else "none"
    if verdict is not None and verdict["low"] is not None:
        gap = f"{verdict['difference']:+.4f} ({verdict['low']:+.4f} to {verdict['high']:+.4f})"
    mean = f"{fmean(losses):.4f}" if losses else "none"
    return arm.name, f"{size:,}" if size else "none", rate, mean, " ".join(f"{loss:.4f}" for loss in losses), gap


def _size(record: StudyRecord, arm: str) -> int:
    return max((cell.trained_parameters or 0 for cell in record.cells_of(arm)), default=0)


def _short(text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        return text
    return f"{int(number):,}" if number == int(number) and abs(number) < 1e15 else f"{number:.4g}"
