"""Mistakes that show only when the Trainer, the data or a checkpoint is needed, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lora.checkpoints.ckpt_path import refuse_other_files
from lightning_lora.checkpoints.verified_io import is_local
from lightning_lora.cli.missing_package import missing_package
from lightning_lora.errors import CheckpointFileError, CommandError, did_you_mean, user_error
from lightning_lora.study.batch_probe import BatchProbe
from lightning_lora.study.rank_probe import RankProbe
from lightning_lora.trainer_access import found


def check_data(module: LightningModule, data: LightningDataModule | None) -> None:
    """Check that there is something to train on.

    Raises:
        ConfigError: If there is no data module, and the module has no training data of its own.
    """
    if data is None and not is_overridden("train_dataloader", module):
        raise CommandError(
            "there is no data: give --config FILE that names some, as cli_configs/sft.yaml does, or --data CLASS_PATH."
        )


def check_trainer(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Check that a fit ends some time, and that a strategy which shards has something to share.

    Args:
        trainer: The Trainer.
        settings: The arguments that it was made with.

    Raises:
        ConfigError: If nothing ends the run, or the strategy shards over one process.
    """
    ends = found(trainer, EarlyStopping, Timer, BatchProbe, RankProbe)
    if ends is None and settings.get("max_epochs") is None and trainer.max_steps == -1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise CommandError(
            "neither trainer.max_steps nor trainer.max_epochs is set, so the run would take the 1,000 epochs of "
            "Lightning: give one of the two, or trainer.max_time. trainer.max_epochs=-1 trains until it is stopped."
        )
    strategy = trainer.strategy
    offloads = (
        isinstance(strategy, FSDPStrategy) and strategy.cpu_offload is not None and strategy.cpu_offload.offload_params
    )
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)) and trainer.world_size == 1 and not offloads:
        raise CommandError(
            f"trainer.strategy {type(strategy).__name__} shares a model between processes, and trainer.devices="
            f"{settings.get('devices')!r} with trainer.num_nodes={trainer.num_nodes} makes one: give more devices, or "
            "leave trainer.strategy out."
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
