"""Faster products of float32 matrices on a GPU."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override


class TF32(Callback):
    """Lets an NVIDIA GPU multiply float32 matrices in TF32 while the Trainer runs; the setting before is restored.

    TF32 rounds the factors of a product to 10 bits after the point, as float16 does, keeps the range of float32 and
    adds in float32. It concerns what remains in float32 (a run in ``32-true``, a new head in mixed precision), not
    products in bfloat16. A choice made by ``torch.backends.cuda.matmul.fp32_precision`` is left alone.
    """

    _before: str | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Allow TF32 if the run is on a GPU."""
        device = trainer.strategy.root_device.type
        if device != "cuda":
            rank_zero_info(f"TF32 has no effect on the {device}.")
            return
        try:
            self._before = torch.get_float32_matmul_precision()
        except RuntimeError:  # what torch answers once the newer attribute was set
            rank_zero_info("TF32: torch.backends.cuda.matmul.fp32_precision was set already, and stays.")
            return
        torch.set_float32_matmul_precision("high")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the setting before."""
        if self._before is not None:
            torch.set_float32_matmul_precision(self._before)
            self._before = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the setting before; Lightning tears callbacks down only after a run that succeeds."""
        self.teardown(trainer, pl_module, "")
