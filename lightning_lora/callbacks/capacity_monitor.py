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
from lightning_lora.capacity.fixed_rows import fixed_batches
from lightning_lora.capacity.measure import CapacityMeter, stored_bits
from lightning_lora.capacity.reading import CapacityReading, Verdict
from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.errors import ConfigError
from lightning_lora.lightning_private import is_accumulating
from lightning_lora.lora.layers.adapted import learning_layers
from lightning_lora.lora.shards import check_not_sharded
from lightning_lora.sharding.collectives import total_of_ranks

PLOT = "capacity.png"


class CapacityMonitor(Callback):
    """Measures whether adapters have room for what they learn, and says so in one sentence at the end.

    At the end of each epoch: bits stored per trained parameter, from the loss of fixed training rows. At every tenth of
    the steps: the share of the gain that is lost when every update is cut to half of its rank. When the learning rate
    is at most a tenth of its peak, and at the end if it is: how much of the gradient the adapters can still follow,
    and all of it by groups of layers.

    The verdict is ``SPARE`` if half of the rank loses less than 2 % of the gain, ``SATURATED`` (likely) if it loses
    more and the adapters cannot follow the gradient, and ``UNDETERMINED`` otherwise, always while the learning rate has
    not decayed. A `RankProbe` then shows whether more rank helps.

    Training is not changed by a bit: weights, gradients, random numbers, optimizer and the place in the data stay as
    they are. Held-out rows are those of the validation data, or training rows if there are none. Losses of rows come
    from ``predict_step`` if it returns a mapping with a ``"loss"``, else from ``training_step``. It works on one device
    and with DDP, where every rank measures the same; where factors are sharded, or nothing is adapted, one warning says
    that nothing is measured. If the monitor fails, training goes on without it.

    Loggers get ``capacity/*``. The run folder gets ``events.jsonl`` and, at the end, ``capacity.png``.

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
        if num_rows < 2:
            raise ConfigError(f"num_rows must be at least 2, got {num_rows}.")
        self.num_rows = num_rows
        self.reading = CapacityReading()
        self._peak = 0.0
        self._rate = 0.0
        self._has_settled = False
        self._meter: CapacityMeter | None = None
        self._seen: Tensor | int = 0
        self._reason_off = ""

    @property
    def verdict(self) -> Verdict:
        """The verdict so far."""
        return self.reading.verdict

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the rows, and measure the loss before training."""
        self._meter, self._reason_off, self._seen = None, "", 0
        self._events = RunEvents(trainer, "CapacityMonitor")
        self._names = {id(p) for layer in learning_layers(pl_module).values() for p in layer.lora_factors().values()}
        planned = trainer.estimated_stepping_batches
        self._every = max(1, math.ceil(planned / self.measurements)) if math.isfinite(planned) else None
        self._guarded(lambda: self._start(trainer, pl_module))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count supervised tokens, or rows where there are none."""
        tokens = count_supervised(batch)
        self._seen = self._seen + (count_rows(batch) if tokens is None else tokens)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Follow the learning rate of the adapters."""
        rates = [g["lr"] for g in optimizer.param_groups if any(id(p) in self._names for p in g["params"])]
        if rates:
            self._rate = float(max(rates))
            self._peak = max(self._peak, self._rate)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure half of the rank when it is due, and all at the first low learning rate."""
        if self._meter is None or is_accumulating(trainer) or trainer.global_step <= self.reading.step:
            return
        self._follow_rate(trainer.global_step)
        if self._every is not None and trainer.global_step % self._every == 0:
            self._guarded(lambda: self._measure(trainer, self._half))
        if self.reading.is_settled and not self._has_settled:
            self._has_settled = True
            self._guarded(lambda: self._measure(trainer, self._all))

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
            self._guarded(lambda: self._measure(trainer, self._all if self.reading.is_settled else self._half))
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
            "seen": int(self._seen),
            "peak": self._peak,
            "rate": self._rate,
            "has_settled": self._has_settled,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the measurements of an interrupted run."""
        self.reading = CapacityReading.from_dict(state_dict["reading"])
        self._peak, self._rate = state_dict["peak"], state_dict["rate"]
        self._has_settled, self._resumed_seen = state_dict["has_settled"], state_dict["seen"]

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        _check_can_measure(trainer, module)
        device = trainer.strategy.root_device
        train = fixed_batches(trainer.train_dataloader, self.num_rows, device)
        gradients = fixed_batches(trainer.train_dataloader, self.gradient_rows, device)
        if train is None or gradients is None:
            raise ConfigError(
                f"the training data are a {type(trainer.train_dataloader).__name__} from which rows cannot be chosen: "
                f"it needs one DataLoader over a dataset with a length."
            )
        held_out = fixed_batches(_validation_loaders(trainer), self.num_rows, device) or train
        self._meter = CapacityMeter(trainer, module, train, held_out, gradients)
        self._seen, self._resumed_seen = getattr(self, "_resumed_seen", 0), 0
        if self.reading.base_loss is None:
            parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
            base = self._meter.bare_train_loss()
            self.reading = replace(self.reading, base_loss=base, parameters=parameters)

    def _follow_rate(self, step: int) -> None:
        rate = self._rate / self._peak if self._peak > 0 else 1.0
        self.reading = replace(self.reading, step=step, rate=rate)

    def _bits(self, meter: CapacityMeter) -> None:
        loss, reading = meter.train_loss(), self.reading
        assert reading.base_loss is not None
        bits = stored_bits(reading.tokens or 0, reading.base_loss, loss, reading.parameters)
        self.reading = replace(reading, train_loss=loss, bits_per_parameter=bits)

    def _half(self, meter: CapacityMeter) -> None:
        self.reading = meter.half_rank(self.reading)

    def _all(self, meter: CapacityMeter) -> None:
        self.reading = meter.settled(meter.half_rank(self.reading))
        if meter.reason_without_capture:
            rank_zero_warn(f"the capacity monitor measures no tangent capture: {meter.reason_without_capture}")

    def _measure(self, trainer: Trainer, measurement: Callable[[CapacityMeter], None]) -> None:
        if self._meter is None:
            return
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
        raise ConfigError(f"{type(module).__name__} has no adapters that are trained.")
    # Kinds, not subclasses: DeepSpeed derives from DDP, and shards.
    if not isinstance(trainer.strategy, SingleDeviceStrategy) and type(trainer.strategy) is not DDPStrategy:
        raise ConfigError(
            f"{type(trainer.strategy).__name__} shards the module, and half of a rank is computed from whole factors: "
            f"use one device or DDP, or measure the saved adapter on one device."
        )
    check_not_sharded(module)


def _validation_loaders(trainer: Trainer) -> Any:
    if trainer.val_dataloaders is None and trainer.enable_validation:
        # Lightning makes them in the first epoch that ends with a validation.
        with kept_random_state(trainer.strategy.root_device):
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True
    return trainer.val_dataloaders
