"""Mistakes that show only when the Trainer, the data or a checkpoint is needed, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lora.checkpoints.ckpt_path import refuse_other_files
from lightning_lora.checkpoints.verified_io import is_local
from lightning_lora.cli.missing_package import missing_package
from lightning_lora.errors import CheckpointFileError, CommandError, did_you_mean, user_error


def check_data(module: LightningModule, data: LightningDataModule | None) -> None:
    """Check that there is something to train on.

    Raises:
        ConfigError: If there is no data module, and the module has no training data of its own.
    """
    if data is None and not is_overridden("train_dataloader", module):
        raise CommandError(
            "there is no data: give --config FILE that names some, as cli_configs/sft.yaml does, or --data CLASS_PATH."
        )


def trainer_error(error: Exception, settings: Mapping[str, Any]) -> Exception:
    """The error of a Trainer that cannot be made, as one line; as it is if it says what to do already.

    Args:
        error: What making the Trainer has raised.
        settings: The arguments of the Trainer.
    """
    if user_error(error) or missing_package(error):
        return error
    known = StrategyRegistry.available_strategies() if "strategy name" in str(error) else ()
    near = did_you_mean(str(settings.get("strategy")), known)
    return CommandError(f"trainer: {' '.join(str(error).split()).rstrip('.!')}{near}")


def check_ckpt_path(path: str, is_fit: bool) -> None:
    """Raise `AdapterFileError` for a path that can be no checkpoint, before the model is built."""
    if path == "best" or (path == "last" and not is_fit):
        raise CheckpointFileError(
            f"ckpt_path {path!r} stands for a checkpoint of a fit in the same process, and a command is a process of "
            "its own: give the path, as runs/sft/version_0/checkpoints/last.ckpt."
        )
    if path not in ("last", "hpc") and is_local(path) and not Path(path).exists():
        raise CheckpointFileError(f"ckpt_path: there is no {path}.")
    refuse_other_files(path)
