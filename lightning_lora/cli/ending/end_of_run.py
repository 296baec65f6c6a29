"""The callback that keeps the losses of a run and reports on it, and says where its files are and what comes next."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_lora.callbacks import AdapterCheckpoint
from lightning_lora.callbacks.progress import LossOfBatch
from lightning_lora.checkpoints.verified_io import is_local
from lightning_lora.cli.ending.loss_curve import draw
from lightning_lora.cli.ending.next_commands import next_commands, shown
from lightning_lora.cli.ending.run_story import Effort, tell_end, tell_start
from lightning_lora.files.adapter.peft_format import CONFIG_FILE
from lightning_lora.files.events import EVENTS_FILE
from lightning_lora.study.matched.record import CURVE
from lightning_lora.study.report.runs.losses import METRICS, LossCurve, read_losses, validation_metric
from lightning_lora.trainer_access import found, run_folder

PICTURE, HTML = "loss.png", "report.html"
_BUFFER = 256
"""Losses that wait on the device until they are read: reading waits for the device."""
_SAVE_SECONDS = 30.0
"""Between two writings of the losses, for a report of a run that goes on."""
_RESTS = 50
"""Times as long as a writing takes, at least, until the next one: those of a million steps take a second."""


class EndOfRun(Callback):
    """Draws ``loss.png`` and writes ``report.html`` when a run ends or is stopped, and says where its files are.

    While it goes on, its losses are kept in ``curve.csv``, with tokens and seconds, and ``events.jsonl`` says how it
    started and ended. The lines name adapter, checkpoints, metrics and pictures, the best validation loss, and the
    commands that generate text, merge and export. Nothing is said of a run that has written neither adapter nor
    checkpoint.

    Attributes:
        curve: The losses so far. Those of a run that is continued come from the ``metrics.csv`` in this run's folder,
            or in that of the checkpoint.
    """

    def __init__(self) -> None:
        self.curve = LossCurve()
        self._folder = ""
        self._has_trained = False
        self._last_step = 0
        self._loss_of = LossOfBatch()
        self._window: list[Tensor] = []
        self._buffer: list[tuple[int, Tensor]] = []
        self._effort = Effort()
        self._saved = self._rest = 0.0
        self._writes = False
        self._failed: set[str] = set()

    def keep_metrics(self, trainer: Trainer) -> None:
        """Read the metrics that lie in the folder of a CSV logger: it deletes them when it is first used."""
        if isinstance(trainer.logger, CSVLogger) and is_local(trainer.logger.log_dir):
            self.curve = read_losses(Path(trainer.logger.log_dir))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the run folder, which all ranks must do."""
        self._folder, self._has_trained = run_folder(trainer), False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the losses up to the first step from the run that this one continues."""
        self._last_step, self._window, self._buffer = trainer.global_step, [], []
        earlier = self.curve
        if trainer.ckpt_path and is_local(str(trainer.ckpt_path)):
            beside = Path(trainer.ckpt_path).parent
            for folder in (beside.parent, beside):
                earlier = earlier if earlier.train else read_losses(folder)
        self.curve = earlier.up_to(trainer.global_step)
        self._effort = Effort(self.curve.effort.get(max(self.curve.effort, default=0), (0, 0.0)))
        fast = trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue]
        self._writes = trainer.is_global_zero and is_local(self._folder) and not fast and self._leaves_files(trainer)
        self._saved = time.perf_counter()
        if self._writes:
            self._guarded(EVENTS_FILE, lambda: tell_start(Path(self._folder), trainer, pl_module))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the loss of an optimizer step: the mean over its micro-batches."""
        if (loss := self._loss_of(trainer, pl_module, outputs)) is not None:
            self._window.append(loss.detach().reshape(()))
        self._effort.add(batch)
        if trainer.global_step == self._last_step:
            return
        self._last_step, self._has_trained = trainer.global_step, True
        self._buffer += ((trainer.global_step, loss) for loss in self._window)
        self._window = []
        self._effort.mark(trainer.global_step)
        if len(self._buffer) >= _BUFFER:
            self._read_buffer()
        if self._is_due(_SAVE_SECONDS):
            self._save_curve()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        self._effort.pause()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the validation loss."""
        name = validation_metric(trainer.callback_metrics)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and name is not None:
            self.curve.validation_name = name
            self.curve.validation[trainer.global_step] = float(trainer.callback_metrics[name])
            if self._is_due(0.0):
                self._save_curve()
        self._effort.resume()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Draw and tell, after other callbacks have written their files."""
        if stage == "fit":
            self._end(trainer, pl_module, None)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw and tell of a run that is stopped or fails."""
        if trainer.state.fn == "fit":
            self._end(trainer, pl_module, exception)

    @staticmethod
    def _leaves_files(trainer: Trainer) -> bool:
        """Whether anything else of the run is written: a run without checkpoints and adapters leaves no trace."""
        return bool(trainer.loggers or trainer.checkpoint_callback or found(trainer, AdapterCheckpoint))

    def _save_curve(self) -> None:
        """Write the losses so far."""
        self._read_buffer()
        started = time.perf_counter()
        self._guarded(CURVE, lambda: self.curve.write(Path(self._folder, CURVE)))
        self._saved = time.perf_counter()
        self._rest = _RESTS * (self._saved - started)

    def _is_due(self, seconds: float) -> bool:
        """Whether the losses may be written again, ``seconds`` after the last time or later."""
        return self._writes and time.perf_counter() - self._saved > max(seconds, self._rest)

    def _read_buffer(self) -> None:
        if self._buffer:
            steps, losses = zip(*self._buffer, strict=True)
            values = zip(steps, torch.stack(losses).tolist(), strict=True)
            for step, group in groupby(values, key=itemgetter(0)):
                self.curve.train[step] = fmean(loss for _, loss in group)
            self._buffer = []
        self._effort.move_to(self.curve)

    def _end(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException | None) -> None:
        """Draw and tell once, on the first rank, if there is a file that training has written."""
        has_trained, self._has_trained = self._has_trained, False
        if has_trained and self._writes:
            self._effort.pause()
            self._save_curve()
            self._guarded(EVENTS_FILE, lambda: tell_end(Path(self._folder), trainer.global_step, exception))
            for logger in trainer.loggers:
                logger.save()
            self._guarded(HTML, lambda: _write_report(self._folder))
        is_told = has_trained and trainer.is_global_zero and is_local(self._folder)
        if not is_told or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        files = _written(trainer, Path(self._folder))
        if not files:
            return
        self._guarded(PICTURE, lambda: draw(self.curve, Path(self._folder, PICTURE)))
        named = (("metrics", METRICS), ("loss curve", PICTURE), ("report", HTML))
        files |= {name: Path(self._folder, file) for name, file in named}
        files = {name: path for name, path in files.items() if path.exists()}
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        rank_zero_info("\n".join(self._lines(pl_module, data, files)))

    def _guarded(self, name: str, write: Callable[[], object]) -> None:
        """Write one of the files; if that fails, say so once and train on."""
        try:
            write()
        except Exception as error:  # a full disk, a backend that does not start: the run is worth more than its picture
            if name not in self._failed:
                self._failed.add(name)
                rank_zero_warn(
                    f"{name} is not made: {type(error).__name__}: {error}. Nothing else of the run is affected."
                )

    def _lines(self, pl_module: LightningModule, data: LightningDataModule | None, files: dict[str, Path]) -> list[str]:
        folder = Path(self._folder)
        places = (f"{name} {_inside(path, folder)}" for name, path in files.items())
        commands = next_commands(pl_module, data, folder, files.get("adapter"))
        losses = self.curve.described()
        if commands:
            losses = f"{losses}. Next:" if losses else "next:"
        return [f"run in {shown(folder)}: {', '.join(places)}", *filter(None, [losses]), *(f"  {c}" for c in commands)]


def _write_report(folder: str) -> None:
    from lightning_lora.study.report.write import write_report  # templates, which the start of a run does not need

    write_report(folder)


def _written(trainer: Trainer, folder: Path) -> dict[str, Path]:
    """Adapter folders and checkpoints of a run, by what they are."""
    files: dict[str, Path] = {}
    writer = found(trainer, AdapterCheckpoint)
    adapters = Path(writer.dirpath) if writer and writer.dirpath else folder / "adapters"
    for name, words in (("last", "adapter"), ("best", "best adapter")):
        if (adapters / name / CONFIG_FILE).is_file() and (name == "last" or (writer and writer.monitor)):
            files[words] = adapters / name
    keeper = found(trainer, ModelCheckpoint)
    best = Path(keeper.best_model_path) if keeper and keeper.monitor and keeper.best_model_path else None
    if best and best.exists():
        files["best checkpoint"] = best
    checkpoints = (
        Path(keeper.dirpath) if keeper and keeper.dirpath and is_local(keeper.dirpath) else folder / "checkpoints"
    )
    last = max(checkpoints.glob("*.ckpt"), key=os.path.getmtime, default=None)
    if last and best and os.path.samefile(last, best):
        files["best and last checkpoint"] = files.pop("best checkpoint")
    elif last:
        files["last checkpoint"] = last
    return files


def _inside(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else shown(path)
