"""A run with a probe is bit-equal to one without, also if the probe fails (F23)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import BatchProbe
from lightning_lora.batch.noise.noise_scale import NoiseScale
from lightning_lora.callbacks import BatchSizeMonitor, LoRAGuard
from lightning_lora.errors import ConfigError, DataError, LoRAError
from lightning_lora.files.events import read_events
from lightning_lora.study.batch_probe_result import BatchProbeResult
from tests.support import toys
from tests.support.monitored import EveryStep

pytestmark = toys.expected_warnings

SMALL: dict[str, Any] = {"ratios": (0.5, 1, 2), "min_steps": 2, "min_epoch": 0, "held_out_rows": 8}


class Net(toys.Toy):
    """Has all that a branch could disturb: dropout, buffers, a step schedule, draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(0.3)
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.net(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.drawn = [random.random(), float(numpy.random.rand()), float(torch.rand(()))]
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        return {"loss": (self(x) - y).square().mean(1)}

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(tmp_path: Path, *callbacks: Callback, module: Any = None, **options: Any) -> tuple[Any, Trainer]:
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    module = module or Net()
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 3, "gradient_clip_val": 0.5}
    trainer = toys.trainer(tmp_path, callbacks=list(callbacks), **(settings | options))
    loader = DataLoader(toys.rows(32), 2, shuffle=True)
    trainer.fit(module, loader, options.pop("validation", toys.loader(16, 2, seed=2)))
    return module, trainer


def state_of(module: Any, trainer: Trainer) -> dict[str, Any]:
    """Everything that a step leaves behind."""
    moments = {
        f"{at}.{name}": value
        for at, part in trainer.optimizers[0].state_dict()["state"].items()
        for name, value in part.items()
    }
    rates = torch.tensor([group["lr"] for group in trainer.optimizers[0].param_groups])
    flags = torch.tensor([child.training for child in module.modules()])
    trained = torch.tensor([part.requires_grad for part in module.parameters()])
    numbers = torch.tensor([random.random(), float(numpy.random.rand()), float(torch.rand(())), *module.drawn])
    return toys.snapshot(module) | moments | {"rates": rates, "flags": flags, "trained": trained, "numbers": numbers}


def test_the_monitor_judges_by_the_probe_at_once(tmp_path: Path) -> None:
    """A scale of 100 rows makes 4 rows a small batch; a probe that found 1 row makes them a large one."""
    monitor = EveryStep()
    _, trainer = fit(tmp_path, monitor, max_epochs=13, limit_val_batches=0)
    monitor._judge.estimate = NoiseScale(100.0, 90.0, 110.0, 1.0, 100.0, conclusive=True)
    monitor.calibrate(trainer, 1.0)
    assert monitor.state == "noise-limited"
    monitor.calibrate(trainer, 0.01)
    assert monitor.reading.fill == pytest.approx(4.0)


@pytest.mark.filterwarnings("ignore:24 optimizer steps are few:UserWarning")
def test_a_run_with_a_probe_is_bit_equal_to_one_without(tmp_path: Path) -> None:
    plain = state_of(*fit(tmp_path, LoRAGuard()))
    probe = BatchProbe(at=0.5, **SMALL)
    module, trainer = fit(tmp_path, probe, LoRAGuard(), EveryStep())
    assert probe.result is not None
    assert probe.result.step == 12
    assert probe.result.batch_rows == 4
    assert list(probe.result.losses) == [2, 4, 8]
    assert toys.same(state_of(module, trainer), plain)
    assert module._trainer is trainer


def test_the_branches_do_train(tmp_path: Path) -> None:
    """A probe that did nothing would leave no trace either. The guard still watches layers here."""
    settings: dict[str, Any] = SMALL | {"ratios": (1, 2, 4)}
    probe = BatchProbe(at=1, **settings)
    fit(tmp_path, probe, LoRAGuard(), accumulate_grad_batches=1)
    assert probe.result is not None
    assert len({probe.result.start_loss, *probe.result.losses.values()}) == 4


class Failing(Net):
    """Raises in the third step of a branch: a copy does not count its steps where the original does."""

    steps = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.trainer.logger is None and self.trainer.limit_val_batches == 0:
            Failing.steps += 1
            if Failing.steps == 3:
                raise RuntimeError("the third step of a branch")
        return super().training_step(batch, batch_idx)


def test_a_run_goes_on_bit_equal_after_a_probe_that_raised(tmp_path: Path) -> None:
    plain = state_of(*fit(tmp_path, LoRAGuard()))
    probe = BatchProbe(at=0.5, **SMALL)
    Failing.steps = 0
    with pytest.warns(UserWarning, match="failed at step 12, and the run continues: the third step") as told:
        module, trainer = fit(tmp_path, probe, LoRAGuard(), module=Failing())
    assert len([each for each in told if "batch probe" in str(each.message)]) == 1
    assert Failing.steps == 3
    assert probe.result is None
    assert toys.same(state_of(module, trainer), plain)
    assert not (tmp_path / "batch_probe.json").exists()


def test_a_run_that_is_for_the_probe_ends_with_its_error(tmp_path: Path) -> None:
    Failing.steps = 0
    with pytest.raises(RuntimeError, match="the third step of a branch"):
        fit(tmp_path, BatchProbe(at=0.5, stop=True, **SMALL), module=Failing())


class Told(BatchSizeMonitor):
    """Has an estimate from the start."""

    def on_train_batch_end(self, *arguments: Any, **options: Any) -> None:
        self._judge.estimate = NoiseScale(2.0, 1.0, 3.0, 1.0, 2.0, conclusive=self.every_n_steps == 1)


class Still(Net):
    """Hardly learns, so that every batch is as good as another."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-7)


@pytest.mark.parametrize("conclusive", [True, False])
def test_what_was_found_is_written_and_calibrates_the_monitor(conclusive: bool, tmp_path: Path) -> None:
    probe, monitor = BatchProbe(at=3, stop=True, **SMALL), Told(every_n_steps=1 if conclusive else 2)
    _, trainer = fit(tmp_path, probe, monitor, module=Still())
    assert trainer.global_step == 3
    assert probe.result is not None
    assert BatchProbeResult.load(tmp_path / "batch_probe.json") == probe.result
    (event,) = [event for event in read_events(tmp_path) if event["event"] == "batch_probe"]
    assert event["largest_harmless"] == probe.result.largest_harmless
    assert (probe.result.largest_harmless, probe.result.bound) == (8, "at least")
    wanted = 4.0 if conclusive else None
    assert monitor.calibration == probe.result.calibration == event["calibration"] == wanted
    if conclusive:
        assert BatchSizeMonitor(calibration=str(tmp_path / "batch_probe.json")).calibration == wanted
    else:
        with pytest.raises(DataError, match=r"batch_probe\.json has no calibration, because the noise scale was u"):
            BatchSizeMonitor(calibration=str(tmp_path / "batch_probe.json"))


def test_a_monitor_is_not_calibrated_by_chance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On 8 held-out rows nobody can tell the batches apart, so the smallest is not the answer."""
    probe, monitor = BatchProbe(at=3, stop=True, **SMALL), Told(every_n_steps=1)
    fit(tmp_path, probe, monitor)
    assert probe.result is not None
    assert (probe.result.undecided, probe.result.calibration, monitor.calibration) == (4, None, None)
    assert "the answer is open, so the monitor could not be calibrated." in caplog.text


def test_a_run_is_probed_once_though_it_is_interrupted(tmp_path: Path) -> None:
    first, second, third = BatchProbe(at=2, **SMALL), BatchProbe(at=2, **SMALL), BatchProbe(at=2, stop=True, **SMALL)
    _, trainer = fit(tmp_path, first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for probe in (second, third):
        again = toys.trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2, callbacks=[probe])
        again.fit(
            Net(), toys.loader(32), toys.loader(16, seed=2), ckpt_path=str(tmp_path / "one.ckpt"), weights_only=False
        )
    assert first.result is not None
    assert second.result is None
    assert third.result is not None
    assert third.result.step == 9


class Blind(Net):
    predict_step = LightningModule.predict_step


class TwoOptimizers(toys.ByHand, Net):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([part], 0.1) for part in self.parameters() if part.requires_grad]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[LoRAError], str]] = [
    ({"at": 25}, {}, ConfigError, "at=25 is beyond the run, which has 24 optimizer steps: lower it"),
    ({}, {"max_epochs": -1}, ConfigError, r"at=0\.3 is a fraction, and the run has no end: give a number of steps"),
    ({}, {"limit_val_batches": 0}, DataError, "on held-out rows: give the run validation data"),
    ({"min_steps": 5}, {}, DataError, "needs 40 training rows, and there are 32: lower min_steps to 4"),
    ({"ratios": (0.2, 1)}, {}, ConfigError, r"0\.2 of a batch of 4 rows is less than a row"),
    ({}, {"module": Blind()}, ConfigError, r"Blind\.predict_step must return a mapping"),
    (
        {},
        {"module": TwoOptimizers(), "accumulate_grad_batches": 1, "gradient_clip_val": None},
        ConfigError,
        "a probe needs a single optimizer that Lightning steps: TwoOptimizers has 4 and steps them itself",
    ),
    (
        {},
        {"strategy": DDPStrategy(process_group_backend="gloo")},
        ConfigError,
        "works on one device, and this run has DDPStrategy with 1: drop it, and run lightning-lora probe on one device",
    ),
]


@pytest.mark.parametrize(("settings", "options", "error", "message"), REFUSED)
def test_what_cannot_be_probed_is_refused_before_the_first_step(
    settings: dict[str, Any], options: dict[str, Any], error: type[LoRAError], message: str, tmp_path: Path
) -> None:
    try:
        with pytest.raises(error, match=message):
            fit(tmp_path, BatchProbe(**(SMALL | settings)), **options)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_validation_that_comes_in_later_epochs_is_there_for_the_probe(tmp_path: Path) -> None:
    probe = BatchProbe(at=1, stop=True, **SMALL)
    fit(tmp_path, probe, check_val_every_n_epoch=3)
    assert probe.result is not None
    assert probe.result.num_held_out == 8


class Plateau(Net):
    """Its schedule needs a metric that no branch logs."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([part for part in self.parameters() if part.requires_grad], lr=0.05)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


def test_branches_leave_schedules_to_the_run(tmp_path: Path) -> None:
    probe = BatchProbe(at=2, stop=True, **SMALL)
    fit(tmp_path, probe, module=Plateau())
    assert probe.result is not None
