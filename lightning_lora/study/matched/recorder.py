"""The callback that follows a run of a study: the same order of data in every arm, what it costs, its curve."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_lora.batch.counting import count_rows, count_supervised
from lightning_lora.callbacks.progress import LossOfBatch
from lightning_lora.errors import ResultFileError, StudySettingError
from lightning_lora.study.bank.process_state import seed_all
from lightning_lora.study.matched.measures.curve import CURVE, CurvePoint, read_curve, validation_metric, write_curve
from lightning_lora.study.matched.measures.energy import joules
from lightning_lora.study.matched.measures.evaluations import Evaluations
from lightning_lora.study.matched.record import CHECKPOINTS
from lightning_lora.study.matched.worker import LeaseLostError


class CellRecorder(Callback):
    """Seeds every epoch alike in all arms, counts steps, tokens and seconds, and writes ``curve.csv``.

    An arm that draws more random numbers than another, for its adapters or its dropout, would otherwise see the rows in
    another order.

    Args:
        lost: Stops the run when it is set: another worker has it.
        evaluations: Evaluate on a log-spaced grid, each step at most this many times the one before; None: the
            validations of the run are its evaluations.
        share: Share of the steps after which the run pauses, to go on later from the checkpoint that it leaves.
        clock: Seconds that count for this run.

    Attributes:
        seconds: Seconds of training, without validation.
        energy: Joules of the GPU in this time; None where it does not tell.
        rate_fell: Whether a learning rate was lowered during the run.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        lost: threading.Event | None = None,
        evaluations: float | None = None,
        share: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.lost = lost or threading.Event()
        self.seconds = 0.0
        self.energy: float | None = None
        self.rate_fell = False
        self._factor = evaluations
        self._now = clock
        self._share = share
        self._last = math.inf
        self._evaluations: Evaluations | None = None
        self._rates: list[float] = []
        self._joules: tuple[torch.device, float] | None = None
        self._evaluated: list[CurvePoint] = []
        self._tokens: Tensor | int = 0
        self._points: list[CurvePoint] = []
        self._waiting: list[tuple[int, Tensor | int, float, Tensor | None]] = []
        self._since: float | None = None
        self._window: list[Tensor] = []  # losses of the micro-batches of the present step
        self._step = 0
        self._loss_of = LossOfBatch()

    @property
    def tokens(self) -> int:
        """Supervised tokens trained on; rows where the batches have no tokens."""
        return int(self._tokens)

    @property
    def on_grid(self) -> bool:
        """Whether evaluations are on a log-spaced grid of steps."""
        return self._factor is not None

    @property
    def evaluations(self) -> tuple[tuple[int, int, float], ...]:
        """Step, tokens and validation loss of each evaluation."""
        return tuple((each.step, each.tokens, each.val_loss or 0.0) for each in self._evaluated)

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
        """Keep the part of the curve before the step that the run continues from, and start the clock.

        Raises:
            ConfigError: If the steps of the run are to be planned, and the module takes them by itself.
        """
        if (self.on_grid or self._share < 1) and not pl_module.automatic_optimization:
            raise StudySettingError(
                f"{type(pl_module).__name__} steps its optimizers itself, as often as it likes, and halving and "
                f"evaluations on a grid need the number of steps: leave both out."
            )
        self._step = trainer.global_step
        before = [point for point in read_curve(self.folder / CURVE) if point.step <= trainer.global_step]
        # The evaluations are those of the checkpoint: `fit` keeps a curve of its own in the same file.
        trained = [point for point in before if point.train_loss is not None]
        self._points = sorted([*trained, *self._evaluated], key=lambda point: point.step)
        if self._factor is not None:
            self._evaluations = Evaluations(trainer, pl_module, self._factor)
        if self._share < 1:
            steps = trainer.estimated_stepping_batches
            if math.isinf(steps):
                raise ResultFileError("halving needs runs with a known number of steps: set trainer.max_steps.")
            self._last = math.ceil(self._share * steps)
            trainer.should_stop = self._step >= self._last  # it was killed after it had come so far
        self._start_clock(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the epoch."""
        self._seed_epoch(trainer.current_epoch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and remember the loss of an optimizer step: the mean over its micro-batches."""
        supervised = count_supervised(batch)
        self._tokens = self._tokens + (count_rows(batch) if supervised is None else supervised)
        if (loss := self._loss_of(trainer, pl_module, outputs)) is not None:
            self._window.append(loss.detach().reshape(()))
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            of_step, self._window = sum(self._window, torch.zeros(())) / len(self._window) if self._window else None, []
            self._waiting.append((self._step, self._tokens, self._clock(), of_step))
            self._watch_rates(trainer)
            if self._evaluations is not None and self._step in self._evaluations.steps:
                self._stop_clock()
                self._add_evaluation(self._evaluations.loss(trainer, pl_module))
                self._start_clock(trainer)
            if self._step >= self._last:
                trainer.save_checkpoint(self.folder / CHECKPOINTS / f"step={self._step}.ckpt")
                trainer.should_stop = True
        if self.lost.is_set():
            raise LeaseLostError

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        if trainer.state.fn == "fit" and self._since is not None:
            self._stop_clock()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the validation loss, and let the clock run again."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        name = validation_metric(trainer.callback_metrics)
        if self._evaluations is None and name is not None:
            self._add_evaluation(float(trainer.callback_metrics[name]))
        self._start_clock(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and write the curve."""
        self._stop_clock()
        self.write()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Counts up to now; the curve is on disk whenever a checkpoint is."""
        self.write()
        return {
            "tokens": self.tokens,
            "seconds": self._clock(),
            "energy": self._energy(),
            "rate_fell": self.rate_fell,
            "window": [float(loss) for loss in self._window],
            "evaluated": [list(astuple(point)) for point in self._evaluated],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]
        self.energy, self.rate_fell = state_dict["energy"], state_dict["rate_fell"]
        self._window = [torch.tensor(loss) for loss in state_dict.get("window", [])]
        self._evaluated = [CurvePoint(*values) for values in state_dict["evaluated"]]

    def _clock(self) -> float:
        return self.seconds + (0.0 if self._since is None else self._now() - self._since)

    def _energy(self) -> float | None:
        if self._joules is None or (now := joules(self._joules[0])) is None:
            return self.energy
        return (self.energy or 0.0) + now - self._joules[1]

    def _start_clock(self, trainer: Trainer) -> None:
        device = trainer.strategy.root_device
        now = joules(device)
        self._since, self._joules = self._now(), None if now is None else (device, now)

    def _stop_clock(self) -> None:
        self.seconds, self._since = self._clock(), None
        self.energy, self._joules = self._energy(), None

    def _watch_rates(self, trainer: Trainer) -> None:
        rates = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.rate_fell = self.rate_fell or any(now < then for now, then in zip(rates, self._rates, strict=False))
        self._rates = rates

    def _add_evaluation(self, loss: float) -> None:
        self.write()
        self._evaluated.append(CurvePoint(self._step, self.tokens, self.seconds, None, loss))
        self._points.append(self._evaluated[-1])

    def _seed_epoch(self, epoch: int) -> None:
        seed_all(random.Random(f"{self.seed} {epoch}").getrandbits(32))

    def write(self) -> None:
        """Write ``curve.csv``."""
        waiting, self._waiting = self._waiting, []
        self._points += [
            CurvePoint(step, int(tokens), seconds, None if loss is None else float(loss), None)
            for step, tokens, seconds, loss in waiting
        ]
        write_curve(self.folder / CURVE, self._points)
