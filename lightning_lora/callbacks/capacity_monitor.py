"""Measures whether adapters have room for what they learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.batch.counting import count_rows, count_supervised
from lightning_lora.batch.run_events import RunEvents
from lightning_lora.capacity.fixed_rows import fixed_batches, validation_loaders
from lightning_lora.capacity.measure import CapacityMeter, stored_bits
from lightning_lora.capacity.reading import CapacityReading, Verdict
from lightning_lora.errors import MeasurementError, check_arguments
from lightning_lora.lightning_private import is_accumulating
from lightning_lora.lora.layers.adapted import learning_layers
from lightning_lora.lora.reports import count_parameters
from lightning_lora.lora.shards import check_not_sharded
from lightning_lora.sharding.collectives import gather_on_rank_zero, total_of_ranks

PLOT = "capacity.png"
_KEY = "lightning_lora_capacity_tokens"


class CapacityMonitor(Callback):
    """Measures whether adapters have room for what they learn, and says so in one sentence at the end.

    At the end of each epoch: bits stored per trained parameter, from the loss of fixed training rows; duplicates count
    as often as they occur. At every tenth of the steps: the share of the gain that is lost when every update is cut to
    half of its rank. When the learning rates are at most a tenth of their peaks, and at the end if they are: how much
    of the gradient the adapters of linear layers can still follow; other layers are left out. At the end: all of it by
    groups of layers.

    The verdict is ``SPARE`` if half of the rank loses less than 2 % of the gain, ``SATURATED`` (likely) if it loses
    more and the adapters cannot follow the gradient, and ``UNDETERMINED`` otherwise, always while the learning rate has
    not decayed. A `RankProbe` then shows whether more rank helps.

    Training is not changed by a bit: weights, gradients, random numbers, optimizer and the place in the data stay as
    they are. Held-out rows are those of the validation data, or training rows if there are none. Losses of rows come
    from ``predict_step`` if it returns a mapping with a ``"loss"``, else from ``training_step``. It works on one device
    and with DDP, where the numbers are those of the first rank; where factors are sharded, or nothing is adapted, one
    warning says that nothing is measured. If the monitor fails, training goes on without it.

    Loggers get ``capacity/*`` (a table in docs/understand/capacity.md). The run folder gets ``events.jsonl`` and,
    at the end, ``capacity.png``.

    Args:
        num_rows: Training rows, and held-out rows, that losses are measured on.

    Attributes:
        reading: The latest `CapacityReading`: all numbers.
        verdict: ``"SPARE"``, ``"SATURATED"`` or ``"UNDETERMINED"``.
        gradient_rows: Training rows that tangent capture is measured on.
        measurements: Number of half-rank measurements in a run, evenly spread.
    """

    # Constants that a subclass or a test may replace.
    gradient_rows: int = 1024
    measurements: int = 10

    def __init__(self, num_rows: int = 256) -> None:
        check_arguments(CapacityMonitor, locals(), MeasurementError)
        if num_rows < 2:
            raise MeasurementError(f"num_rows must be at least 2, got {num_rows}.")
        self.num_rows = num_rows
        self._forget()

    @property
    def verdict(self) -> Verdict:
        """The verdict so far."""
        return self.reading.verdict

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the previous run; a checkpoint is loaded later."""
        if stage == "fit":
            self._forget()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the rows, and measure the loss before training."""
        self._events = RunEvents(trainer, "CapacityMonitor")
        self._names = {id(p) for layer in learning_layers(pl_module).values() for p in layer.lora_factors().values()}
        planned = trainer.estimated_stepping_batches
        if not pl_module.automatic_optimization and trainer.max_steps == -1:
            planned *= len(trainer.optimizers)  # each of them counts its steps
        self._every = max(1, math.ceil(planned / self.measurements)) if math.isfinite(planned) else None
        self._guarded(lambda: self._start(trainer, pl_module))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count supervised tokens, or rows where there are none."""
        tokens = count_supervised(batch)
        self._seen = self._seen + (count_rows(batch) if tokens is None else tokens)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Follow the learning rates of the adapters, which groups may have of their own."""
        place = next(place for place, each in enumerate(trainer.optimizers) if each is optimizer)
        for number, group in enumerate(optimizer.param_groups):
            if any(id(parameter) in self._names for parameter in group["params"]):
                key, rate = f"{place}.{number}", float(group["lr"])
                self._rates[key], self._peaks[key] = rate, max(self._peaks.get(key, 0.0), rate)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure half of the rank when it is due, and tangent capture at the first low learning rate."""
        if self._meter is None or is_accumulating(trainer) or trainer.global_step <= self.reading.step:
            return
        before = self.reading.step
        self._follow_rate(trainer.global_step)
        # A module that steps its optimizers itself may take several steps in a batch.
        if self._every is not None and trainer.global_step // self._every > before // self._every:
            self._guarded(lambda: self._measure(trainer, self._half))
        if self.reading.is_settled and not self._has_settled:
            self._has_settled = True
            self._guarded(lambda: self._measure(trainer, self._half, self._capture))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the bits that an epoch has stored."""
        seen = int(total_of_ranks(trainer, torch.as_tensor(self._seen, dtype=torch.float64)))
        self._seen = 0
        # An epoch that was cut short, or resumed, has shown a part of the rows only.
        self.reading = replace(self.reading, tokens=max(seen, self.reading.tokens or 0))
        self._guarded(lambda: self._measure(trainer, self._bits))
        if self._every is None:
            self._guarded(lambda: self._measure(trainer, self._half))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained adapters, say the verdict, and draw it."""
        if self._meter is not None:
            self._follow_rate(trainer.global_step)
            settled = (self._capture,) if self.reading.is_settled else ()
            self._guarded(lambda: self._measure(trainer, self._half, self._groups, *settled))
        self._guarded(lambda: self._finish(trainer))
        self._meter = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the rows."""
        self._meter = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """The reading so far, the tokens of this epoch, and the learning rates."""
        return {
            "reading": self.reading.to_dict(),
            "rates": dict(self._rates),
            "peaks": dict(self._peaks),
            "has_settled": self._has_settled,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the measurements of an interrupted run."""
        self.reading = CapacityReading.from_dict(state_dict["reading"])
        self._rates, self._peaks = dict(state_dict["rates"]), dict(state_dict["peaks"])
        self._has_settled = state_dict["has_settled"]

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the tokens that each rank has seen in this epoch."""
        checkpoint[_KEY] = gather_on_rank_zero(int(self._seen))

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue to count tokens in the epoch of the checkpoint."""
        counted = checkpoint.get(_KEY, [])
        self._seen = counted[trainer.global_rank] if len(counted) == trainer.world_size else 0

    def _forget(self) -> None:
        self.reading = CapacityReading()
        self._rates: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._has_settled = False
        self._meter: CapacityMeter | None = None
        self._seen: Tensor | int = 0
        self._reason_off = ""

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        _check_can_measure(trainer, module)
        device = trainer.strategy.root_device
        loader = trainer.train_dataloader
        # Rows of several loaders arrive together, and rows of one of them would be no batch.
        train, gradients = (
            None if isinstance(loader, (list, tuple)) and len(loader) > 1 else fixed_batches(loader, count, device)
            for count in (self.num_rows, self.gradient_rows)
        )
        if train is None or gradients is None:
            raise MeasurementError(
                f"the training data are a {type(loader).__name__} from which rows cannot be chosen: it needs one "
                f"DataLoader over a dataset with a length."
            )
        held_out = fixed_batches(validation_loaders(trainer), self.num_rows, device)
        self._meter = CapacityMeter(trainer, module, train, held_out or train, gradients)
        self.reading = replace(self.reading, is_held_out=held_out is not None)
        if self.reading.base_loss is None:
            self.reading = replace(self.reading, base_loss=self._meter.bare_train_loss())
        if not trainer.lr_scheduler_configs and module.automatic_optimization:
            rank_zero_warn(
                "the capacity monitor gives a verdict only when the learning rate has fallen to a tenth of its peak, "
                "and this run has no learning-rate schedule: add one that does."
            )

    def _follow_rate(self, step: int) -> None:
        shares = [rate / self._peaks[key] for key, rate in self._rates.items() if self._peaks[key] > 0]
        self.reading = replace(self.reading, step=step, rate=max(shares, default=1.0))

    def _bits(self, meter: CapacityMeter) -> None:
        loss, reading = meter.train_loss(), self.reading
        assert reading.base_loss is not None
        parameters = count_parameters(meter.module).trainable  # ranks may have grown
        bits = stored_bits(reading.tokens or 0, reading.base_loss, loss, parameters)
        self.reading = replace(reading, train_loss=loss, bits_per_parameter=bits, parameters=parameters)

    def _half(self, meter: CapacityMeter) -> None:
        self.reading = meter.half_rank(self.reading)

    def _groups(self, meter: CapacityMeter) -> None:
        self.reading = meter.groups(self.reading)

    def _capture(self, meter: CapacityMeter) -> None:
        self.reading = meter.tangent_capture(self.reading)

    def _measure(self, trainer: Trainer, *measurements: Callable[[CapacityMeter], None]) -> None:
        if self._meter is None:
            return
        for measurement in measurements:
            measurement(self._meter)
        for logger in trainer.loggers:
            logger.log_metrics(self.reading.numbers, trainer.global_step)
        self._events.write("capacity", trainer.global_step, self.reading.numbers | {"verdict": self.verdict})

    def _finish(self, trainer: Trainer) -> None:
        if self._reason_off or self.reading.loss is None:
            return
        rank_zero_info(self.reading.sentence())
        groups = {name: group.__dict__ | {"state": group.state} for name, group in self.reading.groups.items()}
        event = {"verdict": self.verdict, "sentence": self.reading.sentence(), "groups": groups}
        self._events.write("capacity_verdict", trainer.global_step, event)
        if self._events.folder is not None and groups:
            from lightning_lora.capacity.heat_map import draw_capacity  # matplotlib is slow to import

            draw_capacity(self.reading, self._events.folder / PLOT)

    def _guarded(self, action: Callable[[], None]) -> None:
        """Keep an error of the monitor from ending the run: from then on nothing is measured."""
        try:
            action()
        except Exception as reason:
            self._meter, self._reason_off = None, str(reason)
            rank_zero_warn(f"the capacity monitor measures nothing from here on: {reason}")


def _check_can_measure(trainer: Trainer, module: LightningModule) -> None:
    if not learning_layers(module):
        raise MeasurementError(f"{type(module).__name__} has no adapters that are trained.")
    # Kinds, not subclasses: DeepSpeed derives from DDP, and shards.
    if not isinstance(trainer.strategy, SingleDeviceStrategy) and type(trainer.strategy) is not DDPStrategy:
        raise MeasurementError(
            f"{type(trainer.strategy).__name__} shards the module, and half of a rank is computed from whole factors: "
            f"use one device or DDP, or measure the saved adapter on one device."
        )
    check_not_sharded(module)
