"""What a study folder holds, read back: a report needs nothing else.

``study.yaml`` is the resolved study, ``results.csv`` has a line for each run, ``choices.json`` the rate of each arm,
``verdicts.json`` and ``further.json`` what is found, and ``runs/`` a run folder for each run.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor

from lightning_lora.errors import ResultFileError
from lightning_lora.files.safetensors_file import read_tensors
from lightning_lora.files.yaml_text import read_yaml
from lightning_lora.study.matched.measures.curve import CURVE, CurvePoint, read_curve

STUDY, RESULTS, VERDICTS, RUNS = "study.yaml", "results.csv", "verdicts.json", "runs"
CHOICES, CHECKPOINTS = "choices.json", "checkpoints"
FURTHER, ROW_LOSSES = "further.json", "row_losses.safetensors"
UNTRAINED = "untrained base"
"""Name of the arm that trains nothing: the loss which every other run must beat."""
COLUMNS = (
    *("arm", "learning_rate", "seed", "state", "loss", "steps", "seconds", "peak_bytes", "trained_parameters"),
    *("phase", "tokens", "saved_bytes", "energy_joules", "attempt", "reason", "run", "key", "rows_hash"),
)
"""Columns of ``results.csv``."""
_COUNTS = ("seed", "steps", "peak_bytes", "trained_parameters", "tokens", "saved_bytes", "attempt")
_NUMBERS = ("learning_rate", "loss", "seconds", "energy_joules")
Phase = Literal["base", "rung", "selection", "verdict", "aa"]
State = Literal["ready", "running", "done", "failed", "pruned"]


@dataclass(frozen=True)
class RowLosses:
    """The losses of one run on held-out rows, from ``row_losses.safetensors``.

    Args:
        loss_sum: ``(rows,)`` float64, nats: the sum over the supervised tokens of each row.
        tokens: ``(rows,)`` int64: supervised tokens of each row.
        selection: ``(rows,)`` bool: whether the row chooses learning rates; the others are for the verdict.
    """

    loss_sum: Tensor
    tokens: Tensor
    selection: Tensor

    def mean(self, phase: Phase) -> float:
        """Nats per supervised token over the rows of a phase; NaN without rows."""
        rows = self.rows_of(phase)
        return float(self.loss_sum[rows].sum() / self.tokens[rows].sum())

    def rows_of(self, phase: Phase) -> Tensor:
        """``(rows,)`` bool: whether the row counts in a phase."""
        return self.selection if phase in ("selection", "rung") else ~self.selection


@dataclass(frozen=True)
class CellRecord:
    """One run of a study: a line of ``results.csv``.

    Args:
        arm: Name of its arm; `UNTRAINED` for the base.
        learning_rate: In terms of full fine-tuning; adapters train at ``lora.lr_multiplier`` times it. 0 for the base.
        seed: Moves data order, initialisation and dropout alike in all arms.
        state: ``"ready"`` (waits), ``"running"``, ``"done"``, ``"failed"``, or ``"pruned"``: given up by successive
            halving after the first third of the run. A pruned run counts as worse, and its loss is told nowhere.
        loss: Nats per supervised token on the held-out rows of its phase; None if there is none. May be NaN.
        steps: Optimizer steps.
        seconds: Seconds of training, without validation.
        peak_bytes: Peak memory: allocated on the GPU, else resident in the process.
        trained_parameters: Number of trained parameters.
        phase: ``"selection"`` (chooses the rate), ``"verdict"`` (judged), ``"base"`` (trains nothing), ``"rung"`` (the
            first third of a selection run, with successive halving) or ``"aa"`` (the baseline with other seeds again).
        tokens: Supervised tokens trained on; rows where the batches have no tokens.
        saved_bytes: Bytes of the saved adapter, or of the trained weights.
        energy_joules: Energy of the GPU while it trained, by its driver; None where the device does not tell.
        attempt: How often it was begun.
        reason: Why it failed or was pruned; "" otherwise.
        run: Name of its run folder in ``runs``.
        key: Hash of its resolved config, data and phase.
        rows_hash: SHA-256 of what its held-out rows hold; "" before it is done.
    """

    arm: str
    learning_rate: float
    seed: int
    state: State
    loss: float | None
    steps: int | None
    seconds: float | None
    peak_bytes: int | None
    trained_parameters: int | None
    phase: Phase
    tokens: int | None
    saved_bytes: int | None
    energy_joules: float | None
    attempt: int
    reason: str
    run: str
    key: str
    rows_hash: str = ""


@dataclass(frozen=True)
class ArmRecord:
    """One way to train.

    Args:
        overrides: Dotted option of ``fit`` to value: in what the arm differs from the others.
        config: Its resolved config of ``fit``, without learning rate and seed of a run.
        learning_rates: Rates that its sweep starts with, in terms of full fine-tuning.
        chosen_rate: The rate of its verdict runs; None as long as it is not chosen.
        why: Why this rate, or what the sweep does next.
        problem: Why the rate cannot carry a verdict; "" if it can.
        expected_best: Expected lowest selection loss, nats, of somebody who tries 1, 2, ... of the rates of the sweep;
            diverged runs count with the loss of the untrained base. It describes this sweep only. Empty before the
            sweep is over, or where runs were pruned.
    """

    name: str
    overrides: Mapping[str, Any]
    config: Mapping[str, Any]
    learning_rates: tuple[float, ...]
    chosen_rate: float | None = None
    why: str = ""
    problem: str = ""
    expected_best: tuple[float, ...] = ()


@dataclass(frozen=True)
class StudyRecord:
    """A study folder, read.

    Args:
        folder: The folder.
        spec: All of ``study.yaml``: band, seeds, versions, commands, fingerprints of the data.
        baseline: Name of the arm that others are compared with.
        primary: Name of the arm whose comparison was named as the main one before the start.
        arms: The arms in the order of the study file.
        cells: All runs that the study has asked for so far.
        verdicts: What ``verdicts.json`` holds: for each arm but the baseline ``arm``, ``baseline``, ``verdict`` (the
            word), ``sentence``, ``difference``, ``low``, ``high``, ``seeds``, ``band``, ``alpha``, ``spread``,
            ``inside_band``, ``p``, ``p_corrected``, and

            - ``worst`` and ``baseline_worst``: ``seed`` and ``loss`` of the worst seed of either; the loss is null if
              it diverged, and all is null without runs;
            - ``after_tokens``: trained tokens from which an arm that falls behind stays behind; null if it does not, or
              there are fewer than two evaluations in common;
            - ``steps_to_loss``: null before a verdict, else ``target`` (nats: where 90 % of the baseline's gain is
              reached), ``ratio``, ``low``, ``high`` (steps of the arm over those of the baseline; ``high`` is null
              where there is no upper end), ``bound`` (``""``, ``"at least"``, ``"at most"`` or ``"cannot tell"``: on
              which side ``ratio`` is only a bound), ``seeds``, ``not_reached``, ``text``, and ``reached``: ``arm`` and
              ``baseline``, each seed to ``[steps, bound]``. If there is no number, ``left_out`` has the reason, and
              ``text`` says it.

            Empty before the first verdict.
        noise_floor: The baseline against itself with other seeds, like a verdict, if the study has ``aa``; else None.
        batch_penalty: Whether the large batch costs adapters more than full fine-tuning, like a verdict, whose
            ``difference`` is a difference of differences, if the study has ``batch_penalty``; else None. Both are in
            ``further.json``.
    """

    folder: Path
    spec: Mapping[str, Any]
    baseline: str
    primary: str
    arms: tuple[ArmRecord, ...]
    cells: tuple[CellRecord, ...]
    verdicts: tuple[Mapping[str, Any], ...]
    noise_floor: Mapping[str, Any] | None = None
    batch_penalty: Mapping[str, Any] | None = None

    def cells_of(self, arm: str, phase: Phase | None = None) -> tuple[CellRecord, ...]:
        """The runs of an arm, in one phase or all."""
        return tuple(cell for cell in self.cells if cell.arm == arm and phase in (None, cell.phase))

    def run_folder(self, cell: CellRecord) -> Path:
        """The run folder of a run; it may be absent if the run was made on another machine."""
        return self.folder / RUNS / cell.run

    def row_losses(self, cell: CellRecord) -> RowLosses | None:
        """Losses on single held-out rows; None if the run has none here. A rung has none: its run goes on."""
        file = self.run_folder(cell) / ROW_LOSSES
        return RowLosses(**read_tensors(file)) if cell.phase != "rung" and file.is_file() else None

    def curve(self, cell: CellRecord) -> tuple[CurvePoint, ...]:
        """Losses against steps, tokens and seconds; empty if the run has none here."""
        return read_curve(self.run_folder(cell) / CURVE)

    def base_loss(self, phase: Phase) -> float | None:
        """Loss of the untrained base on the rows of a phase, nats per supervised token; None if it is not measured."""
        for cell in self.cells_of(UNTRAINED):
            if cell.state == "done" and (losses := self.row_losses(cell)) is not None:
                return losses.mean(phase)
        return None


def read_study(folder: str | Path) -> StudyRecord:
    """Read a study folder, finished or not.

    Raises:
        DataError: If it is no study folder, or one of its files is damaged.
    """
    folder = Path(folder)
    if not (folder / STUDY).is_file():
        raise ResultFileError(f"{folder} is no study folder: there is no {STUDY} in it.")
    try:
        spec = read_yaml((folder / STUDY).read_text(encoding="utf-8"))
        cells = read_results(folder / RESULTS)
        verdicts, choices, further = (_json(folder / name) for name in (VERDICTS, CHOICES, FURTHER))
        arms = tuple(_arm(name, settings, choices.get(name, {})) for name, settings in spec["arms"].items())
        found = [further.get(name) for name in ("noise_floor", "batch_penalty")]
        return StudyRecord(folder, spec, spec["baseline"], spec["primary"], arms, cells, tuple(verdicts), *found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ResultFileError(f"{folder} cannot be read as a study: {type(error).__name__}: {error}") from error


def read_results(path: Path) -> tuple[CellRecord, ...]:
    """The lines of ``results.csv``; none if there is no such file."""
    if not path.is_file():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(_cell(row) for row in csv.DictReader(file))


def plain_text(text: str) -> str:
    """A text cell of a CSV file without the quote in front, which keeps spreadsheets from computing it."""
    return text[1:] if re.match(r"'[=+\-@\t\r]", text) else text


def spreadsheet_text(text: str) -> str:
    """A text cell for a CSV file, with a quote in front of what a spreadsheet would take for a formula."""
    return f"'{text}" if re.match(r"'?[=+\-@\t\r]", text) else text


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _arm(name: str, settings: Mapping[str, Any], choice: Mapping[str, Any]) -> ArmRecord:
    rates = tuple(float(rate) for rate in settings["learning_rates"])
    found: dict[str, Any] = dict(choice) | {"expected_best": tuple(choice.get("expected_best", ()))}
    return ArmRecord(name, settings.get("overrides") or {}, settings.get("config") or {}, rates, **found)


def _cell(row: Mapping[str, str]) -> CellRecord:
    row = {"energy_joules": "", "rows_hash": "", **row}  # older studies have no such columns
    values: dict[str, Any] = {name: plain_text(row[name]) for name in COLUMNS}
    numbers = {**dict.fromkeys(_COUNTS, int), **dict.fromkeys(_NUMBERS, float)}
    values |= {name: kind(values[name]) if values[name] else None for name, kind in numbers.items()}
    if any(values[name] is None for name in ("learning_rate", "seed", "attempt")):
        raise ValueError("a run has no learning rate, seed or attempt")
    return CellRecord(**values)
