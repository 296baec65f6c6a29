"""One training run of the demo, measured; runs in a process of its own so that its peak memory is its own."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from typing_extensions import override

from lightning_lora.callbacks import LoRAGuard, LoRAProgressBar
from lightning_lora.cli.embedded import MODEL, TRAIN, VALIDATION
from lightning_lora.cli.quiet import quiet_libraries
from lightning_lora.data import SFTDataModule
from lightning_lora.files.adapter.save_load import save_adapter
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.reports import count_parameters
from lightning_lora.tasks import CausalLM

BATCH_SIZE = 8


@dataclass(frozen=True)
class ArmResult:
    """What one run measured.

    Args:
        name: The method.
        learning_rate: The rate its trained parameters had.
        train_losses: Loss of each optimizer step, nats per supervised token.
        val_losses: Optimizer step to validation loss, nats per supervised token.
        trainable: Number of trained parameters.
        seconds: Wall time of the training steps, validation excluded.
        base_megabytes: Peak resident memory of the process before the first step.
        peak_megabytes: Peak resident memory of the process at the end.
    """

    name: str
    learning_rate: float
    train_losses: tuple[float, ...]
    val_losses: dict[int, float]
    trainable: int
    seconds: float
    base_megabytes: float
    peak_megabytes: float


def train_arm(
    name: str, lora: LoRAConfig | None, learning_rate: float, steps: int, seed: int, adapter: Path | None
) -> ArmResult:
    """Train the embedded model for ``steps`` steps on the embedded rows; write the adapter where one is asked for."""
    _settle_process()
    seed_everything(seed, verbose=False)
    model = CausalLM(str(MODEL), learning_rate=learning_rate, lora=lora)
    data = SFTDataModule(str(TRAIN), str(VALIDATION), batch_size=BATCH_SIZE, seed=seed)
    record = _Record()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[record, LoRAProgressBar(every_n_steps=20), LoRAGuard()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=max(steps // 3, 1),
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
    )
    print(f"\n{name}")
    record.val_losses[0] = trainer.validate(model, data, verbose=False)[0]["val_loss"]
    record.base_megabytes = _peak_megabytes()
    trainer.fit(model, data)
    if adapter is not None:
        save_adapter(model, adapter, {"step": steps, "val_loss": round(record.val_losses[max(record.val_losses)], 4)})
    return ArmResult(
        name=name,
        learning_rate=learning_rate * (1 if lora is None else lora.lr_multiplier),
        train_losses=tuple(record.train_losses),
        val_losses=record.val_losses,
        trainable=count_parameters(model).trainable,
        seconds=record.seconds,
        base_megabytes=record.base_megabytes,
        peak_megabytes=_peak_megabytes(),
    )


class _Record(Callback):
    """Keeps losses and the time of the training steps."""

    def __init__(self) -> None:
        self.train_losses: list[float] = []
        self.val_losses: dict[int, float] = {}
        self.seconds = 0.0
        self.base_megabytes = 0.0
        self._started = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.perf_counter() - self._started
        self.train_losses.append(float(trainer.callback_metrics["train_loss"]))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.val_losses[trainer.global_step] = float(trainer.callback_metrics["val_loss"])


def _settle_process() -> None:
    quiet_libraries()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # One process with two cores loads faster than it could tell workers what to do.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
