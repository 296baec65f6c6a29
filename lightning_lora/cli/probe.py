"""``lightning-lora probe``: trains as ``fit`` does, tries other batch sizes, and writes no run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from typing_extensions import override

from lightning_lora.callbacks import AdapterCheckpoint, AdaptiveAccumulation, BatchSizeMonitor, MergeOnFitEnd
from lightning_lora.cli.preview import preview_data
from lightning_lora.errors import ConfigError, GuardError
from lightning_lora.study.batch_probe import BatchProbe
from lightning_lora.trainer_access import found

FOLDER = "batch_probe"
AT = 100
"""Default number of optimizer steps before the probe; the noise scale is measured from step 50 on."""
_REMOVED = (Checkpoint, AdapterCheckpoint, MergeOnFitEnd, AdaptiveAccumulation)


class ProbingTrainer(Trainer):
    """Lightning's Trainer with three more methods, `probe`, `preview` and `plan`."""

    def probe(
        self,
        model: LightningModule,
        train_dataloaders: TRAIN_DATALOADERS | LightningDataModule | None = None,
        val_dataloaders: EVAL_DATALOADERS | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train for a while, try other batch sizes on the rows that come next, and report which do no harm.

        Args:
            model: The module to train.
            train_dataloaders: Training data, unless a data module is given.
            val_dataloaders: Validation data, unless a data module is given.
            datamodule: A data module with training data.
            ckpt_path: A checkpoint of ``fit`` to start from; the probe runs at step ``at``, or after the next step.
            weights_only: Load the checkpoint without unpickling. None: as Lightning decides.

        Raises:
            GuardError: If the run ended before the probe.
        """
        probe = found(self, BatchProbe)
        assert probe is not None
        try:
            self.fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
        except SIGTERMException as stop:
            raise SystemExit(143) from stop  # Lightning would exit with code 0
        if probe.result is None:
            raise GuardError(f"the run ended at step {self.global_step}, before the probe at {probe.at:g}.")

    def preview(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Show three rows as the model sees them, the trained tokens marked, and what of the data is used.

        Args:
            model: The module that would be trained; its weights are not loaded.
            datamodule: The data module whose rows are shown.
            ckpt_path: Not used; it may stand in the config of a run.
            weights_only: Not used, likewise.
        """
        self.strategy.connect(model)
        preview_data(self, datamodule)

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Check that there is something to plan; the plan itself is made from the module and the data module.

        Args:
            model: The module that would be trained; its weights are not loaded.
            datamodule: The data module with its training rows.
            ckpt_path: Not used; it may stand in the config of a run.
            weights_only: Not used, likewise.

        Raises:
            ConfigError: If there is no data module.
        """
        if datamodule is None:
            raise ConfigError("plan counts the rows of a data module, and none is given: add data: to the config.")


def prepare_probe(config: dict[str, Any]) -> None:
    """Change the arguments of a Trainer for `ProbingTrainer.probe`: a folder of its own, no logger, no checkpoints.

    Args:
        config: Arguments of a Trainer; modified in place.

    Raises:
        ConfigError: If the callbacks hold a `BatchProbe`.
    """
    given = config.get("callbacks") or []
    callbacks: list[Callback] = [each for each in (given if isinstance(given, list) else [given])]
    if any(isinstance(callback, BatchProbe) for callback in callbacks):
        raise ConfigError("the config has a BatchProbe of its own: remove it, or run `fit`, where it works.")
    if not any(isinstance(callback, BatchSizeMonitor) for callback in callbacks):
        callbacks.append(BatchSizeMonitor())
    config["callbacks"] = [*(each for each in callbacks if not isinstance(each, _REMOVED)), _NoValidation()]
    config["default_root_dir"] = str(Path(config.get("default_root_dir") or ".") / FOLDER)
    config |= {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}


class _NoValidation(Callback):
    """Switches validation off: the probe computes its own losses, and Lightning validates when a run stops."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.limit_val_batches = 0
