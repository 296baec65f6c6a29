"""A run is bit for bit what it would have been without the probe in it, one that fails included (F23)."""

from __future__ import annotations

import math
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

from lightning_lora import BatchProbe, LoRAConfig
from lightning_lora.batch.noise.noise_scale import NoiseScale
from lightning_lora.callbacks import BatchSizeMonitor, LoRAGuard
from lightning_lora.cli.embedded import MODEL, TRAIN, VALIDATION
from lightning_lora.data import SFTDataModule
from lightning_lora.errors import ConfigError, DataError, LoRAError
from lightning_lora.files.events import read_events
from lightning_lora.study.batch_probe_result import BatchProbeResult
from lightning_lora.tasks import CausalLM
from tests.support import toys

pytestmark = [
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore:training changed 3 buffers of the base. norm:UserWarning"),
]

SMALL: dict[str, Any] = {"ratios": (0.5, 1, 2), "min_steps": 2, "min_epoch": 0, "held_out_rows": 8}


class Net(toys.Toy):
    """With what a branch could disturb: dropout, buffers, a schedule that counts steps, draws from every generator."""

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
    monitor = BatchSizeMonitor(warmup_steps=0)
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
    module, trainer = fit(tmp_path, probe, LoRAGuard(), BatchSizeMonitor(warmup_steps=0))
    assert probe.result is not None
    assert probe.result.step == 12
    assert probe.result.batch_rows == 4
    assert list(probe.result.losses) == [2, 4, 8]
    assert toys.same(state_of(module, trainer), plain)
    assert module._trainer is trainer


def test_the_branches_do_train(tmp_path: Path) -> None:
    """Or a probe that leaves no trace would be one that does nothing; here the guard still watches layers run."""
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
    with pytest.warns(UserWarning, match="batch probe failed at step 12, and the run goes on: the third step") as told:
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


@pytest.mark.parametrize("conclusive", [True, False])
def test_what_was_found_is_written_and_calibrates_the_monitor(conclusive: bool, tmp_path: Path) -> None:
    probe, monitor = BatchProbe(at=3, stop=True, **SMALL), Told(every_n_steps=1 if conclusive else 2)
    _, trainer = fit(tmp_path, probe, monitor)
    assert trainer.global_step == 3
    assert probe.result is not None
    assert BatchProbeResult.load(tmp_path / "batch_probe.json") == probe.result
    (event,) = [event for event in read_events(tmp_path) if event["event"] == "batch_probe"]
    assert event["largest_harmless"] == probe.result.largest_harmless
    wanted = probe.result.largest_harmless / 2.0 if conclusive else None
    assert monitor.calibration == probe.result.calibration == event["calibration"] == wanted
    if conclusive:
        assert BatchSizeMonitor(calibration=str(tmp_path / "batch_probe.json")).calibration == wanted
    else:
        with pytest.raises(DataError, match=r"the probe of .*batch_probe\.json knew no noise scale"):
            BatchSizeMonitor(calibration=str(tmp_path / "batch_probe.json"))


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


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([part], 0.1) for part in self.parameters() if part.requires_grad]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[LoRAError], str]] = [
    ({"at": 25}, {}, ConfigError, "at=25 is beyond the run, which has 24 optimizer steps: lower it"),
    ({}, {"max_epochs": -1}, ConfigError, r"at=0\.3 is a fraction, and the run has no end: give a number of steps"),
    ({}, {"limit_val_batches": 0}, DataError, "on held-out rows: give the run validation data"),
    ({"min_steps": 5}, {}, DataError, "needs 40 rows, 32 are there: lower min_steps to 4"),
    ({"ratios": (0.2, 1)}, {}, ConfigError, r"a batch of 4 rows has no 0\.2th part"),
    ({}, {"module": Blind()}, ConfigError, r"let Blind\.predict_step return a mapping"),
    (
        {},
        {"module": TwoOptimizers(), "accumulate_grad_batches": 1, "gradient_clip_val": None},
        ConfigError,
        "a probe needs one optimizer that Lightning steps: TwoOptimizers has 4 and steps by itself",
    ),
    (
        {},
        {"strategy": DDPStrategy(process_group_backend="gloo")},
        ConfigError,
        "branches on one device, this is DDPStrategy with 1: drop it, and run lightning-lora probe on one device",
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
    """Its schedule asks for a number that no branch has."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([part for part in self.parameters() if part.requires_grad], lr=0.05)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


def test_branches_leave_schedules_to_the_run(tmp_path: Path) -> None:
    probe = BatchProbe(at=2, stop=True, **SMALL)
    fit(tmp_path, probe, module=Plateau())
    assert probe.result is not None


def fit_sft(tmp_path: Path, *callbacks: Callback, **settings: Any) -> CausalLM:
    torch.manual_seed(0)
    lora = LoRAConfig(rank=2, dropout=0.1)
    module = CausalLM(str(MODEL), learning_rate=1e-3, lora=lora, warmup_steps=2, schedule="linear")
    data = SFTDataModule(
        str(TRAIN), str(VALIDATION), batch_size=2, max_length=600, max_rows=24, validation_rows=6, **settings
    )
    trainer = toys.trainer(
        tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[*callbacks, LoRAGuard()], limit_val_batches=1
    )
    trainer.fit(module, data)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, "length"])
def test_a_language_model_is_trained_bit_equal_with_a_probe(packing: Any, tmp_path: Path) -> None:
    probe = BatchProbe(at=2, ratios=(0.5, 1), min_steps=1, min_epoch=0)
    modules = [fit_sft(tmp_path, packing=packing), fit_sft(tmp_path, probe, packing=packing)]
    assert toys.same(*map(toys.snapshot, modules))
    assert probe.result is not None
    assert list(probe.result.losses) == [2, 4]
    assert math.isfinite(probe.result.start_loss)


def test_the_loss_of_a_row_does_not_depend_on_the_padding_beside_it(tmp_path: Path) -> None:
    folder = toys.save_llama(tmp_path / "llama")
    module = CausalLM(str(folder), lora=LoRAConfig(rank=2))
    rows = [{name: part[: 4 + 3 * at] for name, part in row.items()} for at, row in enumerate(toys.token_rows(3, 10))]

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in fill.items()
        }

    loaders = [DataLoader(rows, size, collate_fn=collate) for size in (1, 3)]  # pyright: ignore[reportArgumentType]
    found = [
        BatchProbe(ratios=(1, 2), min_steps=1, min_epoch=0).run(module, loader, loaders[1], 1) for loader in loaders
    ]
    assert found[0].start_loss == pytest.approx(found[1].start_loss, rel=1e-5)
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-4)
