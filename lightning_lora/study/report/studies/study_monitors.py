"""What monitors have said in the runs of a study: the room of the adapters and the batch, and the layers of one arm."""

from __future__ import annotations

from lightning_lora.study.report.content import Block, Section, Table
from lightning_lora.study.report.numbers import count, short, words
from lightning_lora.study.report.runs.capacity_panel import layer_map
from lightning_lora.study.report.runs.run_record import RunRecord, is_run, read_run
from lightning_lora.study.report.studies.study_facts import StudyFacts


def study_monitors(facts: StudyFacts) -> Section | None:
    """A line for each arm whose runs were watched, and the layers of the main one; None if nothing watched."""
    watched = {arm.name: run for arm in facts.study.arms if (run := _watched(facts, arm.name)) is not None}
    if not watched:
        return None
    rows = []
    for name, (seed, run) in watched.items():
        capacity, sample = run.last_of("capacity_verdict"), run.last_of("noise_scale")
        rows.append(
            [
                words(name),
                count(seed),
                words(str(capacity["sentence"]) if capacity else "-"),
                words(str(sample["state"]) if sample else "-"),
                short(sample["gns/value"] if sample and sample.get("gns/low") is not None else None),
                count(sample["batch/rows"] if sample else None),
            ]
        )
    columns = ["arm", "seed", "capacity", "batch", "noise scale, rows", "rows per step"]
    note = "Each line is one seed. A noise scale is told where it has an interval."
    blocks: list[Block] = [Table("monitors", "What monitors have said at the end of a run", columns, rows, note)]
    order = sorted(watched, key=lambda name: name != facts.study.primary)
    for name in order:
        verdict = watched[name][1].last_of("capacity_verdict")
        if verdict and verdict.get("groups"):
            blocks.append(layer_map(verdict["groups"], f"Layers by role of {name}, seed {watched[name][0]}"))
            break
    return Section("monitors-part", "Capacity and batch", blocks)


def _watched(facts: StudyFacts, arm: str) -> tuple[int, RunRecord] | None:
    """The first verdict run of an arm that has events of a monitor, with its seed."""
    for cell in facts.verdict_runs(arm):
        folder = facts.study.run_folder(cell)
        if is_run(folder):
            run = read_run(folder)
            if run.last_of("capacity_verdict") or run.last_of("noise_scale"):
                return cell.seed, run
    return None
