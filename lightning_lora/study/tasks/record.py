"""``tasks.json``: the scores of all models and the verdicts, written and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.errors import ResultFileError
from lightning_lora.files.atomic import write_text

if TYPE_CHECKING:
    from lightning_lora.study.tasks.judge import BySeed, TaskVerdict
    from lightning_lora.study.tasks.settings import TaskSettings

FOLDER, TASKS = "tasks", "tasks.json"
NO_SEED = -1
"""Seed of a model that was not trained."""


def write_tasks(
    folder: Path,
    settings: TaskSettings,
    version: str,
    baseline: str,
    scores: Mapping[str, BySeed],
    verdicts: Sequence[TaskVerdict],
) -> None:
    """Write ``tasks/tasks.json`` into the folder of a study or run."""
    rows = [
        {
            "arm": arm,
            "seed": None if seed == NO_SEED else seed,
            "task": each.task,
            "metric": each.metric,
            "score": each.mean,
            "questions": len(each.values),
        }
        for arm, by_seed in scores.items()
        for seed, found in sorted(by_seed.items())
        for each in found.values()
    ]
    content = {
        "lm_eval": version,
        "settings": settings.to_dict(),
        "baseline": baseline,
        "verdicts": [verdict.to_dict() for verdict in verdicts],
        "scores": rows,
    }
    write_text(folder / FOLDER / TASKS, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_tasks(folder: Path) -> Mapping[str, Any] | None:
    """What ``tasks/tasks.json`` of a study or run holds; None if nothing was evaluated.

    Raises:
        DataError: If the file is damaged.
    """
    file = folder / FOLDER / TASKS
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if missing := {"verdicts", "scores", "settings"} - found.keys():
            raise KeyError(", ".join(sorted(missing)))
        return found
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ResultFileError(
            f"{file} is damaged: {type(error).__name__}: {error}; remove it and evaluate again."
        ) from error
