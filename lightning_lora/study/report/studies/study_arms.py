"""The table of arms: what each has learnt, what it costs, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from lightning_lora.study.matched.record import UNTRAINED, CellRecord
from lightning_lora.study.report.content import Block, Cell, Section, Table, Words
from lightning_lora.study.report.numbers import NOTHING, count, energy, nats, rate, seconds, size, word_cell, words
from lightning_lora.study.report.studies.study_facts import StudyFacts, with_interval
from lightning_lora.study.report.studies.study_steps import short_ratio, step_ratios
from lightning_lora.study.statistics.before_start import about_the_band


def study_arms(facts: StudyFacts) -> Section:
    """The table, with what the band means here."""
    blocks: list[Block] = [_arms(facts)]
    baseline = facts.study.baseline
    base, final = facts.base_losses.get("verdict"), facts.mean_loss(baseline)
    if base is not None and final is not None:
        lines = about_the_band(baseline, facts.band, base, final, facts.run_spread)
        blocks += [Words(f"{line[:1].upper()}{line[1:]}.", {}, "note") for line in lines]
    return Section("arms", "Arms", blocks)


def _arms(facts: StudyFacts) -> Table:
    slower = step_ratios(facts)
    has_energy = any(cell.energy_joules is not None for cell in facts.study.cells)
    columns = ["arm", "verdict", "difference", "loss", "worst seed", "seeds", "rate", "trained", "peak memory"]
    columns += ["time", *(["energy"] if has_energy else []), "on disk", *(["steps to 90%"] if slower else [])]
    rows = []
    if (base := facts.base_losses.get("verdict")) is not None:
        rows.append([words(UNTRAINED), NOTHING, NOTHING, nats(base), *([NOTHING] * (len(columns) - 4))])
    for arm in facts.study.arms:
        runs, losses = facts.verdict_runs(arm.name), facts.losses(arm.name)
        verdict, worst = facts.verdicts.get(arm.name), losses.worst()
        is_baseline = arm.name == facts.study.baseline
        row = [
            words(arm.name),
            words("baseline") if is_baseline else word_cell(verdict) if verdict else NOTHING,
            _difference(verdict),
            nats(facts.mean_loss(arm.name)),
            nats(worst[1] if worst else None),
            count(len(runs)),
            rate(arm.chosen_rate),
            count(_mean(runs, "trained_parameters")),
            size(_mean(runs, "peak_bytes")),
            seconds(_mean(runs, "seconds")),
            *([energy(_mean(runs, "energy_joules"))] if has_energy else []),
            size(_mean(runs, "saved_bytes")),
        ]
        rows.append([*row, short_ratio(slower.get(arm.name))] if slower else row)
    note = (
        "Loss in nats per supervised token on the verdict rows, mean over seeds; rates in terms of full fine-tuning. "
        "Memory, time and size are means over seeds."
    )
    note += " Steps to 90%: times those of the baseline, to nine tenths of its gain." if slower else ""
    return Table("arm-table", "Arms at their best learning rates", columns, rows, note)


def _difference(verdict: Mapping[str, Any] | None) -> Cell:
    if verdict is None or verdict["difference"] is None:
        return NOTHING
    return Cell(with_interval(verdict), verdict["difference"])


def _mean(runs: list[CellRecord], name: str) -> float | None:
    known = [value for run in runs if (value := getattr(run, name)) is not None]
    return fmean(known) if known else None
