"""TF32 on a GPU while a Trainer runs, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_lora.callbacks import TF32
from tests.support import toys

pytestmark = toys.expected_warnings


class OnGPU(TF32):
    """Believes that the run is on a GPU: the setting is one of torch, and a CPU ignores it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        device = trainer.strategy._root_device  # pyright: ignore[reportAttributeAccessIssue]
        trainer.strategy._root_device = torch.device("cuda")  # pyright: ignore[reportAttributeAccessIssue]
        super().setup(trainer, pl_module, stage)
        trainer.strategy._root_device = device  # pyright: ignore[reportAttributeAccessIssue]


class Looking(toys.Toy):
    found = ""

    def training_step(self, batch: list[Any], batch_idx: int) -> Any:
        self.found = torch.get_float32_matmul_precision()
        if batch_idx == 2:
            raise RuntimeError("stop")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("batches", "fails"), [(2, False), (4, True)])
def test_float32_products_are_in_tf32_in_a_run_on_a_gpu_only(batches: int, fails: bool, tmp_path: Path) -> None:
    module, trainer = Looking(), toys.trainer(tmp_path, limit_train_batches=batches, callbacks=[OnGPU()])
    before = torch.get_float32_matmul_precision()
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            trainer.fit(module, toys.loader())
    else:
        trainer.fit(module, toys.loader())
    assert (before, module.found, torch.get_float32_matmul_precision()) == ("highest", "high", "highest")


def test_a_run_on_a_cpu_is_told_that_nothing_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Looking()
    with caplog.at_level("INFO"):
        toys.fit(module, tmp_path, limit_train_batches=2, callbacks=[TF32()])
    assert module.found == "highest"
    assert "TF32 has no effect on the cpu." in caplog.text
