"""Writes what a study folder holds; `record` reads it back."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.errors import StudySettingError
from lightning_lora.files.atomic import write_text
from lightning_lora.files.yaml_text import read_yaml
from lightning_lora.study.matched.cells import CellStatus
from lightning_lora.study.matched.judging.further import Further
from lightning_lora.study.matched.outcomes import write_row_losses
from lightning_lora.study.matched.record import (
    CHECKPOINTS,
    CHOICES,
    COLUMNS,
    FURTHER,
    RESULTS,
    ROW_LOSSES,
    RUNS,
    STUDY,
    VERDICTS,
    spreadsheet_text,
)
from lightning_lora.study.matched.spec import StudySpec
from lightning_lora.study.statistics.rates.sweep import NextStep
from lightning_lora.study.statistics.verdict import Verdict

_TEXTS = ("arm", "reason", "run")


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that holds something else than the study ``name``.

    Raises:
        ConfigError: If it is a file, holds another study, or other files.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StudySettingError(f"--out {folder} is a file: name a folder.")
    if not (folder / STUDY).is_file():
        if any(
            file.suffix != ".sqlite" and not file.name.startswith((".", "study.sqlite")) for file in folder.iterdir()
        ):
            raise StudySettingError(
                f"--out {folder} holds files and no {STUDY}: it is no study folder; choose another one."
            )
        return
    try:
        there = read_yaml((folder / STUDY).read_text(encoding="utf-8"))["name"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise StudySettingError(f"{folder / STUDY} is damaged: restore it, or choose another --out.") from error
    if there != name:
        raise StudySettingError(f"{folder} holds the study {there!r}, and this one is {name!r}: choose another --out.")


def write_study(folder: Path, spec: StudySpec, made: Mapping[str, Any]) -> None:
    """Write ``study.yaml``."""
    arms = {
        arm.name: {
            "configs": list(arm.configs),
            "overrides": dict(arm.overrides),
            "learning_rates": list(arm.learning_rates),
            "config": arm.config,
        }
        for arm in spec.arms
    }
    content = {
        "name": spec.name,
        "baseline": spec.baseline,
        "primary": spec.primary,
        "band": spec.band,
        "seeds": _seeds(spec),
        "seeds_before": seeds_before(folder, spec),
        "looks": list(spec.plan.looks),
        "alpha": spec.plan.alpha,
        "selection_seeds": list(spec.selection_seeds),
        "learning_rate_option": spec.learning_rate_option,
        "evaluations": spec.evaluations,
        "aa_seeds": list(spec.aa_seeds),
        "halving": spec.halving,
        "batch_penalty": {kind: dict(arms) for kind, arms in spec.batch_penalty.items()},
        "made": dict(made),
        "arms": arms,
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_text(folder / STUDY, text)


def seeds_before(folder: Path, spec: StudySpec) -> list[Any]:
    """The ``seeds`` of earlier starts whose verdicts were there when the study was given others."""
    if not (folder / STUDY).is_file():
        return []
    there = read_yaml((folder / STUDY).read_text(encoding="utf-8"))
    before, now = list(there.get("seeds_before") or []), _seeds(spec)
    has_verdicts = (folder / VERDICTS).is_file() and json.loads((folder / VERDICTS).read_text(encoding="utf-8"))
    if has_verdicts and there["seeds"] not in (now, *before):
        before.append(there["seeds"])
    return before


def _seeds(spec: StudySpec) -> Any:
    return list(spec.seeds) if isinstance(spec.seeds, tuple) else spec.seeds


def write_results(
    folder: Path,
    statuses: Iterable[CellStatus],
    choices: Mapping[str, NextStep],
    verdicts: Iterable[Verdict],
    further: Further,
) -> None:
    """Write ``results.csv``, ``choices.json``, ``verdicts.json`` and ``further.json``, and what other machines did."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for status in statuses:
        writer.writerow(_line(status))
        rows = folder / RUNS / status.cell.run / ROW_LOSSES
        if status.outcome is not None and status.cell.phase != "rung" and not rows.is_file():
            write_row_losses(rows, status.outcome.rows)
        if status.state == "pruned":
            shutil.rmtree(folder / RUNS / status.cell.run / CHECKPOINTS, ignore_errors=True)
    write_text(folder / RESULTS, text.getvalue())
    chosen = {
        name: {
            "chosen_rate": step.chosen,
            "why": step.why,
            "problem": step.problem,
            "expected_best": list(step.expected_best),
        }
        for name, step in choices.items()
    }
    files = {CHOICES: chosen, VERDICTS: [verdict.to_dict() for verdict in verdicts], FURTHER: further.to_dict()}
    for name, found in files.items():
        write_text(folder / name, json.dumps(found, indent=2, allow_nan=False) + "\n")


def _line(status: CellStatus) -> dict[str, Any]:
    cell, outcome = status.cell, status.outcome
    values = {
        "arm": cell.arm,
        "learning_rate": f"{cell.learning_rate:g}",
        "seed": cell.seed,
        "state": status.state,
        "loss": None if status.loss is None else repr(status.loss),
        "phase": cell.phase,
        "attempt": status.attempt,
        "reason": " ".join(status.reason.split()) if status.state in ("failed", "pruned") else "",
        "run": cell.run,
        "key": cell.key,
    }
    if outcome is not None:
        values |= {
            "steps": outcome.steps,
            "seconds": f"{outcome.seconds:.3f}",
            "peak_bytes": outcome.peak_bytes,
            "trained_parameters": outcome.trained_parameters,
            "tokens": outcome.tokens,
            "rows_hash": outcome.rows_hash,
            "saved_bytes": outcome.saved_bytes,
            "energy_joules": None if outcome.energy_joules is None else f"{outcome.energy_joules:.1f}",
        }
    return {name: spreadsheet_text(value) if name in _TEXTS else value for name, value in values.items()}
