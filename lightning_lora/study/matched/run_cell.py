"""One run of a study: trains, or continues from its own last checkpoint, and scores held-out rows."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora.errors import GradientError, ResultFileError, RunFolderError, user_error
from lightning_lora.files.adapter.peft_format import TENSOR_FILE
from lightning_lora.files.checkpoint_manifest import checkpoints_in, examine
from lightning_lora.files.folder_lock import drop_foreign_lock
from lightning_lora.lora.reports import count_parameters
from lightning_lora.memory.process_peak import peak_bytes, restart_peak
from lightning_lora.study.matched.cells import DIVERGED, Outcome
from lightning_lora.study.matched.held_out import held_out_losses
from lightning_lora.study.matched.measures.curve import validation_metric
from lightning_lora.study.matched.outcomes import write_row_losses
from lightning_lora.study.matched.record import CHECKPOINTS, ROW_LOSSES, Phase
from lightning_lora.study.matched.recorder import CellRecorder
from lightning_lora.study.matched.worker import RunError
from lightning_lora.study.statistics.rates.halving import FIRST_RUNG
from lightning_lora.trainer_access import found

EVERY = timedelta(minutes=5)
"""Time between two checkpoints, which is what a kill costs at most."""


class CellCheckpoint(ModelCheckpoint):
    """Keeps the last state of a run, to continue from after a kill."""

    def __init__(self, folder: Path, every: timedelta = EVERY) -> None:
        super().__init__(dirpath=folder / CHECKPOINTS, filename="{step}", train_time_interval=every, save_top_k=1)


def cell_callbacks(folder: Path, recorder: CellRecorder, every: timedelta = EVERY) -> list[Callback]:
    """The callbacks that a Trainer needs for `fit_and_score`."""
    return [recorder, CellCheckpoint(folder, every)]


def fit_and_score(
    trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None, folder: Path, phase: Phase
) -> Outcome:
    """Train and score.

    Args:
        trainer: A Trainer with `cell_callbacks`.
        datamodule: Its data; None if the module has loaders itself.
        phase: ``"base"`` trains nothing.
    """
    recorder = found(trainer, CellRecorder)
    assert recorder is not None
    evaluations = ()
    device = trainer.strategy.root_device  # the module's own is the CPU, before a fit and after it
    restart_peak(device)  # this process may have done another run before
    if phase == "base" and not recorder.on_grid:
        evaluations = _first_evaluation(trainer, module, datamodule)
    elif phase != "base":
        path = last_checkpoint(folder)
        trainer.fit(module, datamodule=datamodule, ckpt_path=path, weights_only=True if path else None)
        if not trainer.global_step:
            raise ResultFileError("the run took no optimizer step: give it training rows and steps.")
        recorder.write()  # `fit` has kept a curve of its own there
        evaluations = recorder.evaluations
    peak = peak_bytes(device)
    steps, trained = trainer.global_step, 0 if phase == "base" else count_parameters(module).trainable
    rows, rows_hash = held_out_losses(trainer, module, datamodule)
    if phase != "rung":
        write_row_losses(folder / ROW_LOSSES, rows)
    if phase == "base" and recorder.on_grid:
        evaluations = ((0, 0, float(rows.loss_sum.sum() / rows.tokens.sum())),)
    saved = _saved_bytes(module, folder) if trained else 0
    return Outcome(
        steps,
        recorder.tokens,
        recorder.seconds,
        peak,
        trained,
        saved,
        rows,
        rows_hash,
        evaluations,
        recorder.rate_fell,
        recorder.energy,
    )


def _first_evaluation(
    trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None
) -> tuple[tuple[int, int, float], ...]:
    """The validation loss before the first step; nothing where none is logged."""
    (metrics, *_) = trainer.validate(module, datamodule=datamodule, verbose=False) or [{}]
    name = validation_metric(metrics)
    return () if name is None else ((0, 0, float(metrics[name])),)


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a run, or None."""
    if not (folder / CHECKPOINTS).is_dir():
        return None
    for path in checkpoints_in(folder / CHECKPOINTS):
        finding = examine(path)
        if finding.damage is None and (finding.version is None or finding.version.is_resumable):
            return path
    return None


def drop_foreign_locks(folder: Path) -> None:
    """Take a run folder over from another machine, whose lease has ended; processes there cannot be looked at."""
    for path in (folder / ".run.lock", folder.parent / f".{folder.name}.lock"):
        drop_foreign_lock(path)


def share_of_run(phase: Phase) -> float:
    """The share of the steps that a run of this phase takes."""
    return FIRST_RUNG if phase == "rung" else 1.0


def remove_checkpoints(folder: Path, phase: Phase) -> None:
    """Remove the checkpoints of a run whose result is recorded: with all arms and seeds they would fill the disk.

    Those of a rung stay until the run goes on from them, or is given up.
    """
    if phase == "rung":
        return
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def as_run_error(error: Exception) -> RunError:
    """What an exception means for a study: NaN and bad input fail at once, anything else may be tried again."""
    known = user_error(error)
    if isinstance(known, RunFolderError):
        return RunError(str(known), is_final=False, is_busy=True)
    if isinstance(known, GradientError):
        return RunError(f"{DIVERGED}: {known}", is_final=True)
    text = " ".join(str(known or error).split())
    return RunError(text if known else f"{type(error).__name__}: {text}"[:500], is_final=known is not None)


def _saved_bytes(module: LightningModule, folder: Path) -> int:
    adapter = folder / "adapters" / "last" / TENSOR_FILE
    if adapter.is_file():
        return adapter.stat().st_size
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
