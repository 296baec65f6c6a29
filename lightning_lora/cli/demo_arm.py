"""One training run of the demo and its measurements; each run has its own process, so peak memory is its own."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median
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
from lightning_lora.memory.process_peak import peak_bytes
from lightning_lora.tasks import CausalLM

BATCH_SIZE = 8


@dataclass(frozen=True)
class ArmResult:
    """Measurements of one run.

    Args:
        name: The method, such as ``"LoRA rank 32"``.
        learning_rate: Learning rate of the trained parameters.
        train_losses: Loss of each optimizer step, in nats per supervised token.
        val_losses: Validation loss by optimizer step, in nats per supervised token.
        trainable: Number of trained parameters.
        step_seconds: Wall time of each optimizer step, without validation.
        base_megabytes: Peak resident memory of the process before the first step, in 2^20 bytes.
        peak_megabytes: Peak resident memory of the process at the end, in 2^20 bytes.
    """

    name: str
    learning_rate: float
    train_losses: tuple[float, ...]
    val_losses: dict[int, float]
    trainable: int
    step_seconds: tuple[float, ...]
    base_megabytes: float
    peak_megabytes: float

    @property
    def usual_step(self) -> float:
        """The median of ``step_seconds``: one stalled step says nothing about a method."""
        return median(self.step_seconds)


def train_arm(
    name: str, lora: LoRAConfig | None, learning_rate: float, steps: int, seed: int, adapter: Path | None
) -> ArmResult:
    """Train the embedded model on the embedded rows.

    Args:
        name: The method, for display.
        lora: LoRA settings; None trains every weight.
        learning_rate: The learning rate of full fine-tuning.
        steps: Number of optimizer steps.
        seed: Seed of data order and adapters.
        adapter: Folder to write the adapter to. None: it is not written.
    """
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
        val_check_interval=steps if steps % 2 else steps // 2,  # once at the end, and half-way
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
    )
    print(f"\n{name}")
    record.val_losses[0] = trainer.validate(model, data, verbose=False)[0]["val_loss"]
    record.base_megabytes = _peak_megabytes()
    trainer.fit(model, data)
    if adapter is not None:
        summary = {"step": steps, "val_loss": round(record.val_losses[max(record.val_losses)], 4)}
        save_adapter(model, adapter, summary, model.trained_tokenizer)
    return ArmResult(
        name=name,
        learning_rate=learning_rate * (1 if lora is None else lora.lr_multiplier),
        train_losses=tuple(record.train_losses),
        val_losses=record.val_losses,
        trainable=count_parameters(model).trainable,
        step_seconds=tuple(record.step_seconds),
        base_megabytes=record.base_megabytes,
        peak_megabytes=_peak_megabytes(),
    )


class _Record(Callback):
    """Records losses and the time of the training steps."""

    def __init__(self) -> None:
        self.train_losses: list[float] = []
        self.val_losses: dict[int, float] = {}
        self.step_seconds: list[float] = []
        self.base_megabytes = 0.0
        self._started = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.step_seconds.append(time.perf_counter() - self._started)
        self.train_losses.append(float(trainer.callback_metrics["train_loss"]))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.val_losses[trainer.global_step] = float(trainer.callback_metrics["val_loss"])


def _settle_process() -> None:
    quiet_libraries()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # These rows load faster in the main process than workers could pass them on.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _peak_megabytes() -> float:
    return (peak_bytes(torch.device("cpu")) or 0) / 2**20
