"""Lightning's weight averaging works on the adapters and resumes, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

from lightning_lora import ConfigError
from tests.support import toys
from tests.support.toys import Toy, fit

pytestmark = toys.expected_warnings


def test_stochastic_weight_averaging_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"StochasticWeightAveraging.*Use AdapterEMA"):
        fit(Toy(), tmp_path, callbacks=[StochasticWeightAveraging(0.1)])


def test_ema_averages_the_adapters_and_resumes(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Toy, Any]:
        module = Toy()
        runner = toys.trainer(tmp_path, max_epochs=epochs, callbacks=[EMAWeightAveraging(decay=0.5)])
        runner.fit(module, toys.loader(), ckpt_path=ckpt_path, weights_only=True)
        return module, runner

    base = toys.base_of(Toy())
    whole, _ = run(2)
    _, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    kept = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert all("lora_" in name for name in [*kept["state_dict"], *kept.get("current_model_state", {})])
    assert toys.same(base, toys.base_of(whole))
    assert all(toys.moved(whole))


class SaveOnce(Callback):
    """A checkpoint in the middle of a run, where averaging keeps two copies of the weights."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_resuming_with_ema_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    whole = Toy()
    fit(whole, tmp_path, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5), SaveOnce(path, step=4)])
    kept = torch.load(path, weights_only=True)
    assert [name for name in kept["current_model_state"] if "lora_" not in name] == []
    resumed = Toy()
    runner = toys.trainer(tmp_path, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5)])
    runner.fit(resumed, toys.loader(), ckpt_path=path, weights_only=True)
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))
