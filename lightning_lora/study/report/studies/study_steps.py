"""How many steps each arm needs to nine tenths of the gain of the baseline, and from where an arm stays behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_lora.study.report.content import Block, Cell, Table
from lightning_lora.study.report.numbers import NOTHING, count, nats, short, words
from lightning_lora.study.report.studies.study_facts import StudyFacts

_SIGNS = {"at least": ">= ", "at most": "<= "}


def step_ratios(facts: StudyFacts) -> dict[str, Mapping[str, Any]]:
    """Arm to its steps against those of the baseline, as ``verdicts.json`` has them, where it has a number."""
    told = {name: verdict.get("steps_to_loss") for name, verdict in facts.verdicts.items()}
    return {name: found for name, found in told.items() if found and found.get("ratio") is not None}


def short_ratio(found: Mapping[str, Any] | None) -> Cell:
    """A ratio of steps in a word: ``1.33x``, ``>= 1.6x``."""
    if not found or found.get("ratio") is None or found.get("bound") == "cannot tell":
        return NOTHING
    return Cell(f"{_SIGNS.get(str(found.get('bound')), '')}{found['ratio']:.2f}x", found["ratio"])


def steps_table(facts: StudyFacts) -> list[Block]:
    """The ratios with their intervals; nothing without any."""
    ratios = step_ratios(facts)
    if not ratios:
        return []
    behind = {name: verdict.get("after_tokens") for name, verdict in facts.verdicts.items()}
    has_behind = any(after is not None for after in behind.values())
    rows = [
        [
            words(name),
            short_ratio(found),
            *(short(found.get(each)) for each in ("low", "high")),
            *(count(found.get(each)) for each in ("seeds", "not_reached")),
            *([count(behind.get(name))] if has_behind else []),
        ]
        for name, found in ratios.items()
    ]
    columns = ["arm", "steps, times the baseline's", "low", "high", "seeds", "not reached in"]
    columns += ["behind after, tokens"] if has_behind else []
    target = next((found["target"] for found in ratios.values() if found.get("target") is not None), None)
    note = (
        f"The loss to reach is {nats(target).text} nats, at which the baseline's selection runs have nine tenths of "
        "their gain. Geometric mean over seeds; >= and <=: some seeds had not reached it, or were there at the first "
        "evaluation. It compares the same place of the same schedule."
    )
    if has_behind:
        note += " Behind after: from there on the interval of the difference stays above zero, taken point by point."
    return [Table("steps", "Steps to nine tenths of the gain", columns, rows, note)]
