"""Branches leave the run they start from alone, and show the cost of a batch (V15)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, LoRAMixin
from lightning_lora.batch_probe import BatchProbeResult, Comparison, batch_probe
from lightning_lora.branches import Branch
from lightning_lora.errors import ConfigError, DataError
from tests import toys

pytestmark = toys.expected_warnings

QUIET: dict[str, Any] = {"accelerator": "cpu"}


class Student(LoRAMixin):
    """Learns a rank-8 teacher from noisy rows (oracle O1 of research/batch_and_capacity.md)."""

    lora = LoRAConfig(rank=8, targets=["layer"])

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(24, 24, bias=False)
        torch.nn.init.zeros_(self.layer.weight)

    def losses(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return 0.5 * (self.layer(x) - y).square().sum(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.losses(batch).mean()

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.losses(batch)}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(3e-4))


def loader(count: int, seed: int, batch_size: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(99)
    teacher = torch.randn(24, 8, generator=generator) @ torch.randn(8, 24, generator=generator) / 8
    generator.manual_seed(seed)
    x = torch.randn(count, 24, generator=generator)
    return DataLoader(TensorDataset(x, x @ teacher.T + 0.5 * torch.randn(count, 24, generator=generator)), batch_size)


def snapshot(tmp_path: Path, seed: int = 0) -> tuple[Student, Branch]:
    module = Student(seed)
    trainer = toys.trainer(tmp_path)
    trainer.fit(module, loader(1024, 1000 + seed))
    return module, Branch(module, trainer.optimizers[0].state_dict(), loader(4096, seed), QUIET)


def test_a_probe_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    module, branch = snapshot(tmp_path)
    before, trainer, random = toys.snapshot(module), module.trainer, torch.get_rng_state()
    batch_probe(branch, 32, 32, (loader(64, 5), range(64)), min_steps=2)
    assert toys.same(toys.snapshot(module), before)
    assert module.trainer is trainer
    assert torch.equal(torch.get_rng_state(), random)


def test_four_steps_where_64_were_are_worse_and_the_same_batch_is_not(tmp_path: Path) -> None:
    _, branch = snapshot(tmp_path)
    held_out = loader(512, 7), range(512)
    result = batch_probe(branch, 32, 512, held_out, ratios=(1, 16), min_steps=4)
    assert result.num_rows == 2048
    assert result.comparisons[0].is_worse
    assert result.largest_harmless == 32
    again = batch_probe(branch, 32, 512, held_out, ratios=(1, 16), min_steps=4)
    assert again == result


def test_the_largest_harmless_batch_is_below_the_first_that_is_worse() -> None:
    def result(*worse: tuple[int, int]) -> BatchProbeResult:
        pairs = [(8, 16), (8, 32), (16, 32)]
        comparisons = tuple(Comparison(s, b, 1.0 if (s, b) in worse else 0.0, 0.1) for s, b in pairs)
        return BatchProbeResult({8: 1.0, 16: 1.0, 32: 1.0}, comparisons, 64)

    assert result().largest_harmless == 32
    assert not result().saw_difference
    assert "no difference seen, so at least: 32 rows" in str(result())
    assert result((16, 32)).largest_harmless == 16
    assert result((8, 16)).largest_harmless == 8
    assert result((8, 32)).largest_harmless == 16


def test_what_cannot_be_probed_is_refused(tmp_path: Path) -> None:
    _, branch = snapshot(tmp_path)
    held_out = loader(8, 5), range(8)
    with pytest.raises(DataError, match=r"needs 4,160 rows, 4,096 are there: lower min_steps to 64"):
        batch_probe(branch, 32, 32, held_out, min_steps=65)
    with pytest.raises(ConfigError, match=r"a batch of 1 rows has no 0\.25th part"):
        batch_probe(branch, 1, 1, held_out)
