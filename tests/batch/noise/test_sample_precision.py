"""Samples in 16 bits are those in 32 (V11), whatever a loss is scaled by, and infinite gradients leave none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig
from lightning_lora.batch.noise.noise_scale import NoiseScale, noise_scale_of_steps
from lightning_lora.mixin.lora_mixin import LoRAMixin
from tests.support import tiny_models, toys
from tests.support.metered import measure

pytestmark = toys.expected_warnings

SIZE, NUM_ROWS, BATCH = 24, 2048, 32
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))


def rows() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(NUM_ROWS, SIZE, generator=generator)
    wanted = torch.randn(SIZE, SIZE, generator=generator) / 3
    return TensorDataset(x, x @ wanted + torch.randn(NUM_ROWS, SIZE, generator=generator) / 2)


class Student(LoRAMixin, LightningModule):
    """Learns a linear map; its rate is zero, so that all precisions see the same weights."""

    def __init__(self, dropout: float, infinite: int | None = None) -> None:
        super().__init__()
        self.lora = LoRAConfig(rank=4, dropout=dropout)
        self.infinite = infinite

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(SIZE, SIZE)
        self.apply_lora()
        tiny_models.wake(self.layer, size=0.2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self.layer(x) - y).square().sum(1).mean() / 2
        return loss * 1e38 if batch_idx == self.infinite else loss

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


def found(
    folder: Path,
    precision: str,
    accumulate: int,
    device: str,
    dropout: float,
    infinite: int | None = None,
    loss_scale: float = 256.0,
) -> list[Any]:
    scaled = [MixedPrecision("16-mixed", device, torch.amp.GradScaler(device, init_scale=loss_scale))]  # pyright: ignore
    trainer = {"plugins": scaled} if precision == "16-mixed" else {"precision": precision}
    loader = DataLoader(rows(), batch_size=BATCH // accumulate)
    options = {"frozen_weights_every": 1, "trainer": trainer | {"accelerator": device}}
    return measure(folder, Student(dropout, infinite), loader, accumulate, **options)


def noise_scale(samples: list[Any], metric: str) -> NoiseScale:
    return noise_scale_of_steps(*torch.tensor([sample[metric][:2] for sample in samples], dtype=torch.float64).T)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_the_noise_scale_in_16_bits_is_that_in_32(precision: str, accumulate: int, device: str, tmp_path: Path) -> None:
    """By rows and by micro-batches, adapters and frozen weights; dropout would hide the difference."""
    wide = found(tmp_path, "32-true", accumulate, device, 0.0)
    narrow = found(tmp_path, precision, accumulate, device, 0.0)
    assert len(narrow) == len(wide) == NUM_ROWS // BATCH
    for metric in ("adapter", "weight"):
        exact, estimate = noise_scale(wide, metric), noise_scale(narrow, metric)
        assert exact.conclusive
        assert estimate.value == pytest.approx(exact.value, rel=0.05)
        # A loss scale that is not divided out would cancel in the quotient.
        assert estimate.signal == pytest.approx(exact.signal, rel=0.05)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_rows_whose_dropout_is_torchs_own_are_seen_in_16_bits(device: str, tmp_path: Path) -> None:
    """Under autocast the update is not fused. With the input before dropout, rows would not add up."""
    (sample, *_) = found(tmp_path, "bf16-mixed", 1, device, 0.5)
    assert sample["adapter"].num_micro_batches == BATCH


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_with_an_infinite_gradient_leaves_no_sample(accumulate: int, tmp_path: Path) -> None:
    samples = found(tmp_path, "16-mixed", accumulate, "cpu", 0.0, infinite=2 * accumulate)
    assert [bool(sample) for sample in samples[:5]] == [True, True, False, True, True]


def test_weights_leave_no_sample_where_the_adapters_gradient_is_infinite(tmp_path: Path) -> None:
    """The loss scale overflows products of finite numbers, as in the skipped steps that a scaler begins with."""
    samples = found(tmp_path, "16-mixed", 1, "cpu", 0.0, loss_scale=2.0**16)
    assert not samples[0]
    assert set(samples[-1]) == {"adapter", "weight"}
    assert all(set(sample) in (set(), {"adapter", "weight"}) for sample in samples)
