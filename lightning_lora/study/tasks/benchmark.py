"""A benchmark of several models: each is written whole, evaluated, and removed; then all are compared."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.files.atomic import write_text
from lightning_lora.study.tasks.judge import TaskVerdict, judge
from lightning_lora.study.tasks.lm_eval_run import check_installed, run_lm_eval, where_code_runs
from lightning_lora.study.tasks.record import FOLDER, NO_SEED, write_tasks
from lightning_lora.study.tasks.samples import Scores, read_scores
from lightning_lora.study.tasks.settings import TaskSettings
from lightning_lora.versions import installed_version

DONE = "evaluation.json"


@dataclass(frozen=True)
class Model:
    """A model to evaluate.

    Args:
        seed: Its seed; `NO_SEED` for a model that was not trained.
        source: An adapter folder, a model folder, or the hub name of a model.
    """

    arm: str
    seed: int
    source: str

    @property
    def folder(self) -> str:
        """Name of its folder in ``tasks``."""
        plain = re.sub(r"[^0-9A-Za-z._-]+", "-", self.arm).strip("-.")[:60] or "arm"
        # Names that differ in other letters only have folders of their own.
        mark = "" if plain == self.arm else f"-{hashlib.sha256(self.arm.encode()).hexdigest()[:6]}"
        return f"{plain}{mark}" if self.seed == NO_SEED else f"{plain}{mark}-s{self.seed}"

    @property
    def title(self) -> str:
        """Its arm and seed."""
        return self.arm if self.seed == NO_SEED else f"{self.arm}, seed {self.seed}"

    def files(self) -> list[list[Any]]:
        """Sizes and times of its weights, by which a changed model is known."""
        place = Path(self.source)
        found = sorted(place.glob("*.safetensors")) if place.is_dir() else []
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in found]


def benchmark(
    folder: Path,
    models: Sequence[Model],
    settings: TaskSettings,
    write_model: Callable[[Path, Path], object],
    baseline: str,
    primary: str,
    seeds: Sequence[int],
    tell: Callable[[str], object] = print,
) -> list[TaskVerdict]:
    """Evaluate all models that are not evaluated yet, compare them, and write ``tasks/tasks.json``.

    Args:
        models: The models; one with `NO_SEED` is shown and not compared.
        write_model: Writes the whole model of an adapter folder to a new folder.
        baseline: The arm that others are compared with.
        primary: The arm whose comparison on the first task is the main one.
        seeds: The seeds that the arms should have.

    Raises:
        ConfigError: If lm-eval is not installed.
        DataError: If it fails.
    """
    check_installed()
    if settings.allow_code_execution:
        tell(where_code_runs(folder / FOLDER))
    scores: dict[str, dict[int, Mapping[tuple[str, str], Scores]]] = {}
    for number, model in enumerate(models, 1):
        place = folder / FOLDER / model.folder
        told = {"settings": settings.to_dict() | {"band": None}, "source": model.source, "files": model.files()}
        done = place / DONE
        if not done.is_file() or json.loads(done.read_text(encoding="utf-8")) != told:
            _evaluate(model, place, settings, write_model)
            write_text(place / DONE, json.dumps(told))
        found = read_scores(place)
        scores.setdefault(model.arm, {})[model.seed] = found
        line = "; ".join(f"{each.task} ({each.metric}) {each.mean:.1%}" for each in found.values())
        tell(f"{number} of {len(models)}: {model.title}: {line or 'no score'}")
    compared = {arm: by_seed for arm, by_seed in scores.items() if set(by_seed) & set(seeds)}
    verdicts = judge(compared, baseline, primary, settings.band, seeds) if baseline in compared else []
    write_tasks(folder, settings, installed_version("lm-eval"), baseline, scores, verdicts)
    return verdicts


def _evaluate(model: Model, place: Path, settings: TaskSettings, write_model: Callable[[Path, Path], object]) -> None:
    (place / DONE).unlink(missing_ok=True)
    if not (Path(model.source) / "adapter_config.json").is_file():
        source = Path(model.source)
        run_lm_eval(settings, source.absolute() if source.is_dir() else model.source, place)
        return
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "merged"
        write_model(Path(model.source), whole)
        run_lm_eval(settings, whole, place)
