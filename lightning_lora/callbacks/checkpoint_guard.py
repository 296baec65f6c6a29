"""Checks before training that checkpoints can be written, and makes each of them whole or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.checkpoints.fallback import choose_checkpoint
from lightning_lora.checkpoints.shards import writes_shards
from lightning_lora.checkpoints.verified_io import is_local, use_verified_checkpoints, verified_io
from lightning_lora.errors import CallbackSettingError, CheckpointFileError
from lightning_lora.files.atomic import atomic_file, remove_leftovers
from lightning_lora.files.checkpoint_manifest import remove_orphans
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.mixin.lora_mixin import LoRAMixin

_MB = 1e6


class CheckpointGuard(Callback):
    """Makes checkpoints atomic and verified, and tests their folder before training starts.

    Gives the Trainer a `VerifiedCheckpointIO` unless it has a CheckpointIO already: ``validate``, ``test`` and
    ``predict`` then refuse a damaged checkpoint, and ``fit`` may resume from the one before it. At the start of ``fit``
    it writes and removes a file in every folder of a checkpoint callback, removes the temporary files of killed
    writers, and compares the free space with the size of the checkpoints to be kept: weights, buffers and optimizer
    state.

    Raises:
        ConfigError: If a folder cannot be written, or has no room for one checkpoint.
        AdapterFileError: If the ranks have loaded different checkpoints, or a sharded strategy loads a damaged one.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the verified CheckpointIO; only ``fit`` may take another checkpoint for a damaged one."""
        use_verified_checkpoints(trainer)
        if io := verified_io(trainer):
            io.is_resuming = stage == "fit"

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a test file into each checkpoint folder, and compare the free space with the size of checkpoints."""
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        for callback in trainer.checkpoint_callbacks:
            folder = getattr(callback, "dirpath", None)
            if folder is None or not is_local(folder):
                continue
            problem = _unwritable(Path(folder)) if trainer.is_global_zero else None
            # Only one rank writes, but all must stop.
            if problem := trainer.strategy.broadcast(problem):
                raise CallbackSettingError(problem)
            size = checkpoint_bytes(trainer, pl_module, getattr(callback, "save_weights_only", False))
            self._check_space(trainer, callback, Path(folder), size)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Verify the file where the strategy reads it without the CheckpointIO."""
        path = trainer.ckpt_path
        if trainer.strategy.restore_checkpoint_after_setup and path and is_local(path) and Path(path).is_file():
            choose_checkpoint(Path(path), fall_back=False)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that all ranks have loaded the same checkpoint, since each reads it by itself."""
        io = verified_io(trainer)
        loaded = io.loaded if io else None
        first = trainer.strategy.broadcast(loaded)
        if not trainer.strategy.reduce_boolean_decision(loaded == first):
            raise CheckpointFileError(
                f"the ranks have loaded different checkpoints: rank 0 {first}, rank {trainer.global_rank} {loaded}. Is "
                "the folder the same on all machines?"
            )

    def _check_space(self, trainer: Trainer, callback: Checkpoint, folder: Path, size: int) -> None:
        kept = _num_kept(trainer, callback)
        # A new checkpoint is written before the old one is removed.
        needed = (kept + 1) * size
        # Only the rank that writes needs to see the folder.
        free = trainer.strategy.broadcast(shutil.disk_usage(folder).free if trainer.is_global_zero else 0)
        text = (
            f"{folder} has {free / _MB:,.1f} MB free; a checkpoint of this run needs about {size / _MB:,.1f} MB, and "
            f"{kept} are kept while the next is written, about {needed / _MB:,.1f} MB. Free some space, set another "
            "dirpath, or keep fewer (save_top_k, save_last, save_weights_only of ModelCheckpoint)."
        )
        if free < size:
            raise CallbackSettingError(text)
        if free < needed:
            rank_zero_warn(text)


def checkpoint_bytes(trainer: Trainer, module: LightningModule, weights_only: bool) -> int:
    """The approximate size of a checkpoint in bytes: weights, buffers and an estimate of the optimizer state.

    Args:
        trainer: Holds the optimizers, whose kind tells how much state they keep.
        module: The module of the checkpoint. With adapters of a `LoRAMixin` only trained weights and buffers count,
            unless checkpoints are written in shards.
        weights_only: Whether optimizer state is left out.
    """
    adapters_only = isinstance(module, LoRAMixin) and bool(lora_layers(module)) and not writes_shards(trainer.strategy)
    held = [p for p in module.parameters() if p.requires_grad or not adapters_only]
    weights = sum(map(_bytes, [*held, *module.buffers()]))
    if weights_only:
        return weights
    return weights + sum(
        _num_states(optimizer) * sum(_bytes(p) for group in optimizer.param_groups for p in group["params"])
        for optimizer in trainer.optimizers
    )


def _num_states(optimizer: Optimizer) -> int:
    """The number of tensors of a parameter's size that the optimizer keeps for it; 2, as for Adam, where unknown."""
    settings = optimizer.defaults
    if "betas" not in settings and "momentum" in settings:
        return int(settings["momentum"] != 0)
    return 3 if settings.get("amsgrad") else 2


def _num_kept(trainer: Trainer, callback: Checkpoint) -> int:
    """The number of checkpoints that a callback keeps in its folder."""
    if not isinstance(callback, ModelCheckpoint):
        return 1
    last = int(bool(callback.save_last) and callback.save_last != "link")
    if callback.save_top_k >= 0:
        return callback.save_top_k + last
    epochs, every = trainer.max_epochs or 0, callback.every_n_epochs or 0
    steps, every_step = trainer.max_steps, callback._every_n_train_steps
    # save_top_k=-1 keeps all of them: as many as the run will write, at least one.
    return max(1, epochs // every if every else 0, steps // every_step if every_step else 0) + last


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _unwritable(folder: Path) -> str | None:
    """Try to write a file as checkpoints are written; returns a message for the user where that fails, else None."""
    probe = folder / f"probe-{os.getpid()}"
    try:
        with atomic_file(probe) as file:
            file.write(b"Can a checkpoint be written here?")
        probe.unlink()
        remove_leftovers(folder)
        remove_orphans(folder)
    except OSError as error:
        return f"checkpoints cannot be written to {folder}: {error.strerror}. Set another dirpath, or its permissions."
    return None
