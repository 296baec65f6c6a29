"""Each callback of Lightning beside adapters, by the mixin and by the callback."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import lora_layers, lora_state_dict
from tests.integration.lightning import adapted_runs
from tests.integration.lightning.adapted_runs import WAYS
from tests.support import toys

pytestmark = [
    pytest.mark.slow,
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore:.*was called without a model. The last model of the previous"),
    pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:this run goes on, but not exactly as it would have"),
    pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`, you need to define a `flops_per_batch`"),
]
ways = pytest.mark.parametrize("way", WAYS)


class Writer(callbacks.BasePredictionWriter):
    """Keeps what it is to write."""

    def __init__(self) -> None:
        super().__init__("epoch")
        self.written: list[Any] = []

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.written.extend(predictions)


def logged(folder: Path) -> dict[str, Any]:
    return {"logger": CSVLogger(folder), "log_every_n_steps": 1}


# These look on, and may not change what is trained.
ONLOOKERS: dict[str, tuple[Callable[[Path], Callback], Callable[[Path], dict[str, Any]]]] = {
    "Callback": (lambda folder: Callback(), lambda folder: {}),
    "Checkpoint": (lambda folder: callbacks.Checkpoint(), lambda folder: {"enable_checkpointing": True}),
    "DeviceStatsMonitor": (lambda folder: callbacks.DeviceStatsMonitor(cpu_stats=False), logged),
    "EarlyStopping": (lambda folder: callbacks.EarlyStopping("train_loss", patience=9), lambda folder: {}),
    "LambdaCallback": (lambda folder: callbacks.LambdaCallback(on_fit_end=lambda *_: None), lambda folder: {}),
    "LearningRateMonitor": (lambda folder: callbacks.LearningRateMonitor(), logged),
    "ModelCheckpoint": (
        lambda folder: callbacks.ModelCheckpoint(folder / "kept", monitor="val_loss", save_last=True),
        lambda folder: {"enable_checkpointing": True},
    ),
    "ModelSummary": (lambda folder: callbacks.ModelSummary(3), lambda folder: {"enable_model_summary": True}),
    "OnExceptionCheckpoint": (
        lambda folder: callbacks.OnExceptionCheckpoint(folder / "kept"),
        lambda folder: {"enable_checkpointing": True},
    ),
    "RichModelSummary": (lambda folder: callbacks.RichModelSummary(3), lambda folder: {"enable_model_summary": True}),
    "RichProgressBar": (lambda folder: callbacks.RichProgressBar(), lambda folder: {"enable_progress_bar": True}),
    "SpikeDetection": (lambda folder: callbacks.SpikeDetection(rtol=1000.0), lambda folder: {}),
    "TQDMProgressBar": (lambda folder: callbacks.TQDMProgressBar(), lambda folder: {"enable_progress_bar": True}),
    "ThroughputMonitor": (
        lambda folder: callbacks.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2),
        logged,
    ),
    "Timer": (lambda folder: callbacks.Timer(timedelta(minutes=1)), lambda folder: {}),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The adapters of a run without callbacks, for each way."""
    return {way: lora_state_dict(train(way, tmp_path_factory.mktemp(way)).lightning_module) for way in WAYS}


def train(way: str, folder: Path, *added: Callback, **options: Any) -> Any:
    torch.manual_seed(0)
    return adapted_runs.fit(way, folder, *added, **options)


@ways
@pytest.mark.parametrize("name", ONLOOKERS)
def test_an_onlooker_leaves_the_run_as_it_is(way: str, name: str, alone: dict[str, Any], tmp_path: Path) -> None:
    make, options = ONLOOKERS[name]
    trainer = train(way, tmp_path, make(tmp_path), **options(tmp_path))
    assert toys.same(lora_state_dict(trainer.lightning_module), alone[way])


@ways
def test_early_stopping_stops(way: str, tmp_path: Path) -> None:
    trainer = train(way, tmp_path, callbacks.EarlyStopping("train_loss", patience=0, min_delta=1e6), max_epochs=9)
    assert trainer.current_epoch == 2


@ways
def test_a_timer_stops(way: str, tmp_path: Path) -> None:
    trainer = train(way, tmp_path, callbacks.Timer(timedelta(microseconds=1)), max_epochs=9)
    assert trainer.global_step == 1


@ways
def test_the_accumulation_scheduler_accumulates(way: str, tmp_path: Path) -> None:
    assert train(way, tmp_path, callbacks.GradientAccumulationScheduler({0: 2})).global_step == 2


@ways
def test_the_learning_rate_monitor_logs_the_rate_of_the_adapters(way: str, tmp_path: Path) -> None:
    monitor = callbacks.LearningRateMonitor()
    trainer = train(way, tmp_path, monitor, **logged(tmp_path))
    assert trainer.logged_metrics["train_loss"].isfinite()
    assert monitor.lrs == {"lr-Adam": [0.05] * len(monitor.lrs["lr-Adam"])}


@ways
def test_predictions_of_the_adapted_module_are_written(way: str, tmp_path: Path) -> None:
    writer = Writer()
    trainer = train(way, tmp_path, writer)
    trainer.predict(trainer.lightning_module, return_predictions=False)
    module: Any = trainer.lightning_module
    for found, batch in zip(writer.written, toys.loader(), strict=True):
        assert torch.equal(found, module(batch[0]))


@ways
def test_the_checkpoint_of_an_exception_holds_the_adapters_and_goes_on(way: str, tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("power cut")

    kept = callbacks.OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        train(way, tmp_path, kept, Stops(), enable_checkpointing=True)
    file = torch.load(kept.ckpt_path, weights_only=True)
    assert file["global_step"] == 2
    assert all("lora_" in name for name in file["state_dict"])
    module, own = adapted_runs.student(way)
    trainer = toys.trainer(tmp_path, callbacks=own)
    trainer.fit(module, ckpt_path=kept.ckpt_path, weights_only=True)
    assert (trainer.global_step, len(lora_layers(module))) == (4, 2)


@ways
def test_a_spike_of_the_loss_is_found(way: str, tmp_path: Path) -> None:
    class Jumps(callbacks.SpikeDetection):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            loss = outputs["loss"] if trainer.global_step < 3 else outputs["loss"] * 1e6
            super().on_train_batch_end(trainer, pl_module, {"loss": loss}, batch, batch_idx)

    with pytest.raises(TrainingSpikeException):
        train(way, tmp_path, Jumps(warmup=1, rtol=2.0, exclude_batches_path=str(tmp_path / "bad.json")))


@ways
def test_the_summary_counts_the_adapters(way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(way, tmp_path, callbacks.ModelSummary(1), enable_model_summary=True)
    assert "44        Trainable params" in caplog.text
    assert "58        Non-trainable params" in caplog.text
