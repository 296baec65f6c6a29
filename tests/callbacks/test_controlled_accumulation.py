"""V13: accumulation follows a noise scale that falls, within the changes it may make, and stays where it does not."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora.callbacks import AdaptiveAccumulation, BatchSizeMonitor
from lightning_lora.files.events import read_events
from tests.support import toys

pytestmark = [pytest.mark.slow, *toys.expected_warnings, *toys.monitor_warnings]

SIZE = 64
BEFORE, AFTER = 64.0, 4.0
"""Noise scales in rows; the second is a sixteenth of the first."""
BATCH, ACCUMULATE = 4, 8
NUM_STEPS, FALLS_AT, COOLDOWN = 450, 120, 0.1


class Noisy(LightningModule):
    """The gradient of a row is a constant signal of length 1 plus normal noise: the noise scale is known and stays."""

    level: Tensor
    signal: Tensor

    def __init__(self, noise_scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))
        self.register_buffer("signal", torch.full((SIZE,), SIZE**-0.5))
        self.register_buffer("level", torch.zeros(()))
        self.set_noise_scale(noise_scale)

    def set_noise_scale(self, rows: float) -> None:
        """The trace of the covariance over the squared signal, which is 1."""
        self.level.fill_((rows / SIZE) ** 0.5)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return ((self.signal + self.level * batch) @ self.weight).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.weight], lr=1e-3)


class Fall(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, Noisy)
        if trainer.global_step == FALLS_AT:
            pl_module.set_noise_scale(AFTER)


def changes(
    folder: Path, seed: int, num_steps: int, batch: int = BATCH, k: int = ACCUMULATE, more: tuple[Callback, ...] = ()
) -> list[dict[str, Any]]:
    """The changes of accumulation in a controlled run."""
    generator = torch.Generator().manual_seed(seed)
    rows: Any = torch.randn(num_steps * k * batch, SIZE, generator=generator)
    monitor = BatchSizeMonitor(every_n_steps=1, calibration=1.0)
    callbacks = [monitor, AdaptiveAccumulation(cooldown=COOLDOWN), *more]
    folder.mkdir()
    trainer = toys.trainer(folder, accumulate_grad_batches=k, callbacks=callbacks)
    trainer.fit(Noisy(BEFORE), DataLoader(rows, batch))
    return [event for event in read_events(folder) if event["event"] == "accumulation"]


@pytest.mark.parametrize("seed", range(2))
def test_accumulation_follows_a_noise_scale_that_falls(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The batch is halved from 32 rows to 4, the noise scale."""
    with caplog.at_level(logging.INFO):
        found = changes(tmp_path / "run", seed, NUM_STEPS, more=(Fall(),))
    assert [(change["old"], change["new"]) for change in found] == [(8, 4), (4, 2), (2, 1)]
    steps = [change["step"] for change in found]
    assert steps[0] > FALLS_AT
    assert all(later - earlier >= COOLDOWN * NUM_STEPS for earlier, later in itertools.pairwise(steps))
    assert caplog.text.count("accumulation is 1: only fewer devices or a smaller micro-batch") == 1


@pytest.mark.parametrize("seed", range(20))
def test_accumulation_stays_where_the_noise_scale_stays(seed: int, tmp_path: Path) -> None:
    """The batch is half the noise scale, so halving it gains nothing."""
    assert changes(tmp_path / "run", seed, 160, batch=8, k=4) == []
