"""Training progress: a bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from lightning_lora.batch.counting import count_items
from lightning_lora.errors import CallbackSettingError, check_arguments
from lightning_lora.lightning_private import is_accumulating
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.memory.process_peak import peak_bytes

from .one_reading import reading_of

_LOSS, _COUNT = "loss of the bar", "count of the bar"
BAR_SECONDS = 0.5  # between two readings for the bar; each waits for the device


class LossOfBatch:
    """Finds the loss of a batch in ``on_train_batch_end``; one object sees the batches of one run, in order."""

    def __init__(self) -> None:
        self._logged: Tensor | None = None

    def logged(self, trainer: Trainer) -> Tensor | None:
        """``train_loss`` if the module has logged it in this batch; also before the batch ends."""
        logged = trainer.callback_metrics.get("train_loss")
        return None if logged is self._logged else logged

    def __call__(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> Tensor | None:
        """``train_loss`` if the module logs it at every step, else what ``training_step`` returns; None without one."""
        logged, previous = trainer.callback_metrics.get("train_loss"), self._logged
        self._logged = logged
        if logged is not None and logged is not previous:  # the same object again is the mean of the last epoch
            return logged
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return None
        # Lightning divides it by the accumulation, but not with manual optimization.
        return loss * trainer.accumulate_grad_batches if pl_module.automatic_optimization else loss


class LoRAProgressBar(RichProgressBar):
    """Shows loss, learning rate of the adapters, tokens per second and peak memory during training.

    On a terminal or in a notebook it is a bar. Elsewhere (a log file, a pipe, a batch job, ``TERM=dumb``) it prints
    plain lines without control characters: one every ``every_n_steps`` optimizer steps, one after the last step, and
    one with the validation metrics after each validation. Only rank 0 shows anything, and it counts its own tokens.

    Tokens are counted by ``attention_mask``, without padding, else all of ``input_ids``; a batch without either is
    counted in rows. Time spent in validation does not count. The loss is ``train_loss`` if the module logs it at every
    step, else the one that ``training_step`` returns. Memory is the peak allocated on the GPU, else the peak resident
    size of this process, in MB (10^6 bytes).

    Args:
        every_n_steps: Number of optimizer steps between two plain lines, at least 1.

    Raises:
        ConfigError: If ``every_n_steps`` is less than 1.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        check_arguments(LoRAProgressBar, locals(), CallbackSettingError)
        if every_n_steps < 1:
            raise CallbackSettingError(f"every_n_steps must be at least 1, got {every_n_steps}.")
        super().__init__(refresh_rate=10)
        self.every_n_steps = every_n_steps
        self.plain = not _on_terminal()
        self._throughput = Throughput()
        self._reset()

    @property
    @override
    def is_enabled(self) -> bool:
        """Whether there is a bar; without one plain lines are printed."""
        return super().is_enabled and not self.plain

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check again where the output goes: it may have been redirected since the bar was made."""
        self.plain = not _on_terminal()
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._reset()
        self._last_step = trainer.global_step
        self._throughput.restart()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the batch."""
        self._due = False
        if self._enabled:
            self._throughput.add(batch)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the numbers that are due after the step, so that they are read with what the step waits for."""
        if not (self._enabled and pl_module.automatic_optimization) or is_accumulating(trainer):
            return
        self._due = self._is_due(trainer.global_step + 1)
        if self._due:
            for name, number in ((_LOSS, self._loss_of.logged(trainer)), (_COUNT, self._throughput.count)):
                if isinstance(number, Tensor):
                    reading_of(trainer).ask(name, number)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show all numbers when they are due."""
        if self._enabled:
            self._epoch = trainer.current_epoch
            self._loss = self._loss_of(trainer, pl_module, outputs)
            if self._due or (not pl_module.automatic_optimization and self._is_due(trainer.global_step)):
                self._report(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a line for the steps after the last full ``every_n_steps``."""
        super().on_train_end(trainer, pl_module)
        if self.plain and self._enabled and trainer.global_step > self._last_step:
            self._report(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and remember which metrics are logged outside of validation."""
        self._throughput.pause()
        self._other_metrics = trainer.callback_metrics.keys() - self._val_metrics
        super().on_validation_start(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation metrics, and let the clock run again."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            logged = trainer.callback_metrics
            self._val_metrics.update(logged.keys() - self._other_metrics)
            texts = {name: f"{float(logged[name]):.4g}" for name in logged if name in self._val_metrics}
            self._print_line(trainer, "validation at ", texts)
        self._throughput.resume()

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The numbers of the bar: loss, rate, speed and memory, then what the module logs with ``prog_bar=True``."""
        logged = super().get_metrics(trainer, pl_module)
        hidden = {"loss"} if "train_loss" in logged else set()
        return {name: text for name, text in self.readings.items() if name not in hidden} | logged

    def _reset(self) -> None:
        self.readings: dict[str, str] = {}
        self._due = False
        self._last_step = self._epoch = 0
        self._loss: Tensor | None = None
        self._loss_of = LossOfBatch()
        self._val_metrics: set[str] = set()
        self._other_metrics: set[str] = set()

    def _is_due(self, step: int) -> bool:
        if not self.plain:
            return not self.readings or self._throughput.seconds >= BAR_SECONDS
        # Not by the remainder: with manual optimization one batch can take several optimizer steps.
        return step // self.every_n_steps > self._last_step // self.every_n_steps

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show all numbers; those that were not read with the step are read now."""
        self._last_step = trainer.global_step
        self.readings = {}
        reading = reading_of(trainer)
        loss = reading.take(_LOSS) or (None if self._loss is None else [float(self._loss)])
        if loss is not None:
            self.readings["loss"] = f"{loss[0]:.4g}"
        if rates := _learning_rates(trainer, pl_module):
            self.readings["lr"] = "/".join(f"{rate:.3g}" for rate in rates)
        if speed := self._throughput.read(reading.take(_COUNT)):
            self.readings[f"{speed[0]}/s"] = f"{speed[1]:,.0f}" if speed[1] >= 10 else f"{speed[1]:.2g}"
        if (peak := peak_bytes(pl_module.device)) is not None:
            self.readings["memory"] = f"{peak / 1e6:,.0f} MB"
        self._print_line(trainer, "", self.readings)

    def _print_line(self, trainer: Trainer, prefix: str, texts: Mapping[str, str]) -> None:
        if self.plain and self._enabled:
            last = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
            where = f"{prefix}epoch {self._epoch}, step {trainer.global_step}{last}"
            self.print("  ".join([where, *(f"{name} {text}" for name, text in texts.items())]), flush=True)


class Throughput:
    """Tokens or rows per second, without the time of pauses.

    A count on an accelerator stays there until it is read, so counting never waits for the device.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget all counts and start the clock."""
        self.unit: str | None = None
        self.count: Tensor | int = 0
        self._start = time.perf_counter()
        self._paused_at: float | None = None

    def pause(self) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Let the clock run again after a pause."""
        if self._paused_at is not None:
            self._start += time.perf_counter() - self._paused_at
            self._paused_at = None

    @property
    def seconds(self) -> float:
        """Seconds since the last reading."""
        return time.perf_counter() - self._start

    def add(self, batch: Any) -> None:
        """Count one batch."""
        count, unit = count_items(batch)
        self.count = count if unit != self.unit else self.count + count
        self.unit = unit

    def read(self, count: Sequence[float] | None = None) -> tuple[str, float] | None:
        """``("tokens", per second)`` or ``("rows", per second)`` since the last reading; None without a count.

        Args:
            count: The number in ``count`` if the host knows it already; None waits for the device.
        """
        unit, seconds = self.unit, self.seconds
        number = count[0] if count else float(self.count)
        self.restart()
        return (unit, number / seconds) if unit and number else None


def needs_metric(trainer: Trainer | None, name: str) -> bool:
    """Whether a module should log ``train_loss`` for the bar; no other name.

    `LoRAProgressBar` finds it by itself when a reading is due. What is logged with ``prog_bar=True`` Lightning reads
    several times in every batch, and waits for the device.
    """
    bar = None if trainer is None else trainer.progress_bar_callback
    return name == "train_loss" and bar is not None and not isinstance(bar, LoRAProgressBar)


def _on_terminal() -> bool:
    """Whether the output can be overwritten. Colour settings do not matter: a coloured log file is still a file."""
    console = Console()
    return console.is_jupyter or (sys.stdout.isatty() and not console.is_dumb_terminal)


def _learning_rates(trainer: Trainer, pl_module: LightningModule) -> list[float]:
    """The distinct learning rates of the parameter groups with adapters, or of all groups if none has any."""
    adapters = {id(factor) for factor in factor_parameters(pl_module).values()}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    ours = [group for group in groups if any(id(parameter) in adapters for parameter in group["params"])]
    return list(dict.fromkeys(float(group["lr"]) for group in ours or groups if "lr" in group))
