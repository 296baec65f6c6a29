"""``lightning-lora probe``: what ``fit`` would train, with other batches, and no trace of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from typing_extensions import override

from lightning_lora.callbacks import AdapterCheckpoint, AdaptiveAccumulation, BatchSizeMonitor, MergeOnFitEnd
from lightning_lora.errors import ConfigError, GuardError
from lightning_lora.study.batch_probe import BatchProbe
from lightning_lora.trainer_access import found

FOLDER = "batch_probe"
AT = 100
"""Optimizer steps before the probe, by default: the noise scale is measured from step 50 on."""
_LEFT_OUT = (Checkpoint, AdapterCheckpoint, MergeOnFitEnd, AdaptiveAccumulation)


class ProbingTrainer(Trainer):
    """A Trainer that can also probe."""

    def probe(
        self,
        model: LightningModule,
        train_dataloaders: TRAIN_DATALOADERS | LightningDataModule | None = None,
        val_dataloaders: EVAL_DATALOADERS | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train for a while, then try other batches on the rows that come next, and say which do no harm.

        Args:
            model: To train.
            train_dataloaders: As in ``fit``.
            val_dataloaders: As in ``fit``.
            datamodule: As in ``fit``.
            ckpt_path: A checkpoint of ``fit`` to start from; the probe comes at step ``at``, or after the next one.
            weights_only: As in ``fit``.

        Raises:
            GuardError: If the run ended before it came to the probe.
        """
        probe = found(self, BatchProbe)
        assert probe is not None
        try:
            self.fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
        except SIGTERMException as stop:
            raise SystemExit(143) from stop  # Lightning would say that all is well
        if probe.result is None:
            raise GuardError(f"the run ended at step {self.global_step}, before the probe at {probe.at:g}.")


def probing(config: dict[str, Any]) -> None:
    """Change settings of a Trainer for `ProbingTrainer.probe`: it writes into a folder of its own, and no checkpoint.

    Args:
        config: Arguments of a Trainer; changed.

    Raises:
        ConfigError: If there is a `BatchProbe` among its callbacks.
    """
    given = config.get("callbacks") or []
    callbacks: list[Callback] = [each for each in (given if isinstance(given, list) else [given])]
    if any(isinstance(callback, BatchProbe) for callback in callbacks):
        raise ConfigError("the config has a BatchProbe of its own: drop it, or run `fit`, which it works in.")
    if not any(isinstance(callback, BatchSizeMonitor) for callback in callbacks):
        callbacks.append(BatchSizeMonitor())
    config["callbacks"] = [*(each for each in callbacks if not isinstance(each, _LEFT_OUT)), _NoValidation()]
    config["default_root_dir"] = str(Path(config.get("default_root_dir") or ".") / FOLDER)
    config |= {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}


class _NoValidation(Callback):
    """The probe scores by itself, and stopping a run validates it."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.limit_val_batches = 0
