"""The callback that follows a run of a study: the same order of data in every arm, what it costs, its curve."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_lora.batch.counting import count_rows, count_supervised
from lightning_lora.callbacks.progress import LossOfBatch
from lightning_lora.files.atomic import atomic_file
from lightning_lora.study.matched.record import CURVE, CurvePoint, read_curve
from lightning_lora.study.matched.worker import LeaseLostError


class CellRecorder(Callback):
    """Seeds every epoch alike in all arms, counts steps, tokens and seconds, and writes ``curve.csv``.

    An arm that draws more random numbers than another, for its adapters or its dropout, would otherwise see the rows in
    another order.

    Args:
        folder: The run folder.
        seed: Seed of the run.
        lost: Stops the run when it is set: another worker has it.
    """

    def __init__(self, folder: Path, seed: int, lost: threading.Event | None = None) -> None:
        self.folder = folder
        self.seed = seed
        self.lost = lost or threading.Event()
        self.seconds = 0.0
        self._tokens: Tensor | int = 0
        self._points: list[CurvePoint] = []
        self._waiting: list[tuple[int, Tensor | int, float, Tensor | None]] = []
        self._since: float | None = None
        self._step = 0
        self._loss_of = LossOfBatch()

    @property
    def tokens(self) -> int:
        """Supervised tokens trained on; rows where the batches have no tokens."""
        return int(self._tokens)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the order of the data follow the seed of the run where held-out rows must not."""
        module = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if stage == "fit" and getattr(module, "validation_share", None) is not None:
            # The data module has chosen the held-out rows by its own seed, which all runs share.
            module.seed = self.seed

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed before the loaders begin."""
        self._seed_epoch(trainer.current_epoch)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the part of the curve before the step that the run continues from, and start the clock."""
        self._step = trainer.global_step
        self._points = [point for point in read_curve(self.folder / CURVE) if point.step <= trainer.global_step]
        self._since = time.perf_counter()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the epoch."""
        self._seed_epoch(trainer.current_epoch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and remember the loss of an optimizer step."""
        supervised = count_supervised(batch)
        self._tokens = self._tokens + (count_rows(batch) if supervised is None else supervised)
        loss = self._loss_of(trainer, pl_module, outputs)
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._waiting.append((self._step, self._tokens, self._clock(), None if loss is None else loss.detach()))
        if self.lost.is_set():
            raise LeaseLostError

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        if trainer.state.fn == "fit" and self._since is not None:
            self.seconds, self._since = self._clock(), None

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the validation loss, and let the clock run again."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if (name := validation_metric(trainer.callback_metrics)) is not None:
            loss = float(trainer.callback_metrics[name])
            self._write()
            self._points.append(CurvePoint(trainer.global_step, self.tokens, self.seconds, None, loss))
        self._since = time.perf_counter()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and write the curve."""
        self.seconds, self._since = self._clock(), None
        self._write()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Counts up to now; the curve is on disk whenever a checkpoint is."""
        self._write()
        return {"tokens": self.tokens, "seconds": self._clock()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]

    def _clock(self) -> float:
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def _seed_epoch(self, epoch: int) -> None:
        seed_all(random.Random(f"{self.seed} {epoch}").getrandbits(32))

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._points += [
            CurvePoint(step, int(tokens), seconds, None if loss is None else float(loss), None)
            for step, tokens, seconds, loss in waiting
        ]
        lines = [",".join(("step", "tokens", "seconds", "train_loss", "val_loss"))]
        for point in self._points:
            step, tokens, seconds, *losses = astuple(point)
            texts = ("" if loss is None else repr(loss) for loss in losses)
            lines.append(",".join([str(step), str(tokens), f"{seconds:.3f}", *texts]))
        with atomic_file(self.folder / CURVE) as file:
            file.write(("\n".join(lines) + "\n").encode())


def seed_all(seed: int) -> None:
    """Seed all global generators; unlike `seed_everything` it leaves nothing in the environment."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def validation_metric(names: Any) -> str | None:
    """The logged metric that is a validation loss, ``val_loss`` before its other spellings; None without one."""
    fitting = [name for name in names if name.lower().startswith("val") and name.lower().endswith("loss")]
    return min(fitting, key=lambda name: (name != "val_loss", len(name)), default=None)
