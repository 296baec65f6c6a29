"""Accumulation changes without a stale gradient, a lost micro-batch, or a schedule that ends early or late (V12)."""

from __future__ import annotations

import contextlib
import csv
import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader

from lightning_lora import LoRAMixin
from lightning_lora.batch.accumulation import may_switch
from lightning_lora.callbacks import AdaptiveAccumulation, BatchSizeMonitor, TargetBatchSize
from lightning_lora.errors import ConfigError
from lightning_lora.files.events import read_events
from tests.support import resuming, toys

pytestmark = toys.expected_warnings


class Ones(LightningModule):
    """Every micro-batch has a gradient of 1, so a step shows the number of micro-batches it was made of."""

    kind: Any = LambdaLR

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.steps: list[float] = []
        self.rates: list[float] = []
        self.sums_agree: list[bool] = []
        self.hooked: Any = 0.0
        self.weight.register_hook(self.add)

    def add(self, gradient: Tensor) -> None:
        self.hooked = self.hooked + gradient

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight * 1.0

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        assert self.weight.grad is not None
        self.steps.append(round(float(self.weight.grad) * self.trainer.accumulate_grad_batches, 9))
        self.rates.append(optimizer.param_groups[0]["lr"])
        # They would differ if a gradient of the step before were left over.
        self.sums_agree.append(bool(self.hooked == self.weight.grad))
        self.hooked = 0.0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([self.weight], lr=1.0, betas=(0.9, 0.99))
        total = self.trainer.estimated_stepping_batches
        self.scheduler = (
            LambdaLR(optimizer, lambda step: 1 - step / total) if self.kind is LambdaLR else StepLR(optimizer, 1)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}


def fit(tmp_path: Path, callbacks: list[Callback], start: int, module: Ones | None = None, **options: Any) -> Ones:
    module = module or Ones()
    rows: Any = torch.zeros(options.pop("rows", 96), 1)
    options = {"accumulate_grad_batches": start, "callbacks": callbacks} | options
    toys.trainer(tmp_path, **options).fit(module, DataLoader(rows))
    return module


def tour() -> tuple[dict[int, int], list[int]]:
    """A schedule that asks for every change at every window between two places where it may happen; and the windows."""
    pairs = [(old, new) for old, new in itertools.product(range(1, 9), repeat=2) if old != new]
    # The windows of ``old``, counted from the last place where a window of ``new`` might begin too.
    left = {(old, new): set(range(math.lcm(old, new) // old)) for old, new in pairs}
    schedule: dict[int, int] = {}
    windows, batch, k = [1], 1, 1
    while any(left.values()):
        cycles = {new: math.lcm(k, new) // k for new in range(1, 9) if new != k}
        here = [
            (dwell, new)
            for dwell in range(8)
            for new, cycle in cycles.items()
            if (batch // k + dwell) % cycle in left[k, new]
        ]
        dwell, new = here[0] if here else (0, next(old for (old, _), places in left.items() if places))
        wish = batch // k + dwell
        left[k, new].discard(wish % cycles[new])
        schedule[len(windows) + dwell] = new
        until_change = dwell + -wish % cycles[new]
        windows += [k] * until_change + [new]
        batch, k = batch + until_change * k + new, new
    return schedule, windows


def test_every_change_at_every_step_keeps_windows_whole(tmp_path: Path) -> None:
    """V12: all pairs of 1 to 8, asked for at all places, each made at the first place where nothing is left over."""
    schedule, windows = tour()
    assert len(schedule) > 200
    module = fit(tmp_path, [AdaptiveAccumulation(schedule)], 1, rows=sum(windows) + 1)
    assert module.steps == [*windows, 1.0]
    assert module.sums_agree == [True] * len(module.steps)
    # The schedule has counted all planned steps, though fewer were done.
    assert float(module.scheduler.last_epoch) == pytest.approx(sum(windows) + 1)


def test_a_change_in_the_wrong_place_would_reuse_gradients(tmp_path: Path) -> None:
    """The oracle of the tests above can fail: 4 -> 3 before batch 4 shows 4 + 2 micro-batches in a step."""
    assert not may_switch(4, 4, 3)

    class Wrong(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 4:
                trainer.accumulate_grad_batches = 3

    assert fit(tmp_path, [Wrong()], 4, accumulate_grad_batches=4).steps[1] > 4


def test_rates_and_decays_follow_the_batch(tmp_path: Path) -> None:
    module = Ones()
    trainer = toys.trainer(tmp_path, accumulate_grad_batches=4, callbacks=[AdaptiveAccumulation({6: 2})])
    trainer.fit(module, DataLoader(torch.zeros(48, 1)))  # pyright: ignore[reportArgumentType]
    (group,) = trainer.optimizers[0].param_groups
    assert group["betas"] == (0.9, pytest.approx(0.99**0.5))
    # 12 steps were planned; the last 6 are spread over 12 steps.
    expected = [1 - step / 12 for step in range(6)]
    expected += [(1 - (6 + step / 2) / 12) / math.sqrt(2) for step in range(12)]
    # The first rate after the change was set by the scheduler's step before it.
    assert module.rates == pytest.approx(expected)


@pytest.mark.parametrize(("later", "beta2"), [({6: 4}, 0.99), ({6: 1}, 0.99**0.5), ({3: 8, 6: 1}, 0.99**0.5)])
def test_decays_stay_for_larger_batches_and_a_way_back_ends_where_it_began(
    later: dict[int, int], beta2: float, tmp_path: Path
) -> None:
    there_and_back = later | {12: 2}
    for schedule, expected in ((later, beta2), (there_and_back, 0.99)):
        trainer = toys.trainer(tmp_path, accumulate_grad_batches=2, callbacks=[AdaptiveAccumulation(schedule)])
        trainer.fit(Ones(), DataLoader(torch.zeros(96, 1)))  # pyright: ignore[reportArgumentType]
        (group,) = trainer.optimizers[0].param_groups
        assert group["betas"] == (0.9, pytest.approx(expected))


@pytest.mark.parametrize("max_steps", [20])
def test_a_run_of_so_many_steps_keeps_its_schedule(max_steps: int, tmp_path: Path) -> None:
    module = fit(tmp_path, [AdaptiveAccumulation({6: 2}, lr_rule="none")], 4, max_steps=max_steps, max_epochs=-1)
    assert module.rates == pytest.approx([1 - step / max_steps for step in range(max_steps)])


class Adapted(resuming.DiceyLoRA):
    """Draws random numbers, and lowers its learning rate by the step."""

    def configure_optimizers(self) -> Any:
        total = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.AdamW(self.lora_parameter_groups(0.005), betas=(0.9, 0.99))
        linear = LambdaLR(optimizer, lambda step: 1 - step / (total + 1))
        return [optimizer], [{"scheduler": linear, "interval": "step"}]


def test_a_run_goes_on_exactly_around_a_change(tmp_path: Path) -> None:
    """7 batches an epoch: 4, 3; then after the change at the start of the second 2, 2, 2, 1; then from its sixth 1."""

    def run(place: str = "") -> resuming.Outcome:
        changing = AdaptiveAccumulation({2: 2, 5: 1})
        path = tmp_path / f"{place}.ckpt" if place else None
        return resuming.run(Adapted, tmp_path, path, accumulate_grad_batches=4, callbacks=[changing])

    whole = run()
    assert [step for step, _, _ in whole.losses[:14]] == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6]
    # In an open window before a change, right before it, in the first window after it, right after that; twice.
    for place in ("batch-0-2", "batch-0-7", "epoch-0", "batch-1-1", "batch-1-2", "batch-1-6", "batch-1-7", "batch-2-1"):
        found = resuming.unlike(whole, run(place))
        assert not found, f"{place}: {found[:5]}"


class RestoresLate(SingleDeviceStrategy):
    """As FSDP2 and DeepSpeed do: schedules are made before the checkpoint is read."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, RestoresLate])
@pytest.mark.parametrize("saved_after", [2, 5])
def test_a_run_goes_on_in_larger_batches_with_steps_of_the_same_rows(
    strategy: type[SingleDeviceStrategy], saved_after: int, tmp_path: Path
) -> None:
    """4 x 1 rows a step, then 2 x 1 from the third on, are 2 x 2 and 1 x 2."""

    def run(batch_size: int, **options: Any) -> Ones:
        changing = AdaptiveAccumulation({3: 2}, lr_rule="none")
        settings: dict[str, Any] = {"accumulate_grad_batches": 4, "callbacks": [changing, Keep(saved_after)]}
        trainer = toys.trainer(tmp_path, strategy=strategy(torch.device("cpu")), **settings)
        rows: Any = torch.zeros(24, 1)
        trainer.fit(module := Resumable(), DataLoader(rows, batch_size), weights_only=True, **options)
        return module

    whole = run(1)
    assert whole.steps == [4, 4, 4] + [2] * 6
    with pytest.warns(UserWarning, match="batches of 1 rows and now has batches of 2: random numbers start anew"):
        resumed = run(2, ckpt_path=tmp_path / "kept.ckpt")
    assert resumed.steps == [2] * (3 - saved_after) + [1] * min(6, 9 - saved_after)
    assert resumed.rates == pytest.approx(whole.rates[saved_after:])


class Resumable(LoRAMixin, Ones):
    lora = None


class Keep(Callback):
    """Saves after a number of steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.after and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "kept.ckpt")


def test_a_checkpoint_whose_steps_cannot_be_made_is_refused(tmp_path: Path) -> None:
    rows: Any = torch.zeros(24, 1)
    for batch_size, path, schedule, message in (
        (1, None, {3: 2}, ""),
        (
            8,
            "kept.ckpt",
            {3: 2},
            r"the checkpoint \(effective batch 4 = 1 row x 4 .*\) has steps of 4 rows, which 8 rows x 1 devices",
        ),
        (4, "kept.ckpt", {3: 2}, "from step 3 on the schedule has steps of 2 rows, which 4 rows x 1 devices do not"),
    ):
        callbacks = [AdaptiveAccumulation(schedule), Keep(2)]
        trainer = toys.trainer(tmp_path, accumulate_grad_batches=4, callbacks=callbacks)
        expected = pytest.raises(ConfigError, match=message) if path else contextlib.nullcontext()
        with expected:
            trainer.fit(
                Resumable(), DataLoader(rows, batch_size), ckpt_path=path and tmp_path / path, weights_only=True
            )


def test_a_change_is_told_to_loggers_and_events(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(tmp_path, [AdaptiveAccumulation({3: 2})], 4, rows=24, logger=CSVLogger(tmp_path, "", ""))
    (event,) = (event for event in read_events(tmp_path) if event["event"] == "accumulation")
    assert event == {"event": "accumulation", "step": 3, "old": 4, "new": 2, "lr_factor": pytest.approx(0.5**0.5)}
    with (tmp_path / "metrics.csv").open() as file:
        logged = {int(row["step"]): float(row["batch/k"]) for row in csv.DictReader(file) if row["batch/k"]}
    assert logged == {0: 4.0, 3: 2.0}
    assert "accumulation 4 -> 2 from optimizer step 4 on; learning rates x 0.707" in caplog.text


class Steps(Ones):
    kind = StepLR


class ByHand(toys.ByHand, Ones):
    pass


REFUSED: dict[str, tuple[list[Callback], type[Ones], str]] = {
    "no monitor": ([AdaptiveAccumulation()], Ones, "needs a BatchSizeMonitor with a calibration.*lightning-lora probe"),
    "not calibrated": ([AdaptiveAccumulation(), BatchSizeMonitor()], Ones, "needs a BatchSizeMonitor with a calibr"),
    "two schedules": (
        [AdaptiveAccumulation({0: 2}), GradientAccumulationScheduler({0: 1})],
        Ones,
        "GradientAccumulationScheduler and AdaptiveAccumulation both set .*: keep one of the two",
    ),
    "a target": ([AdaptiveAccumulation({0: 2}), TargetBatchSize(8)], Ones, "the schedule of Adaptive.* and target_"),
    "StepLR": ([AdaptiveAccumulation({0: 2})], Steps, "StepLR cannot be stretched"),
    "by hand": ([AdaptiveAccumulation({0: 2})], ByHand, "with manual optimization the module decides when to step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_changed_is_refused(name: str, tmp_path: Path) -> None:
    callbacks, module, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, callbacks, 1, module())


@pytest.mark.parametrize("options", [{"schedule": {}}, {"schedule": {0: 0}}, {"lr_rule": "linear"}, {"cooldown": 2}])
def test_settings_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AdaptiveAccumulation(**options)
