"""A run that is told to stop ends after its optimizer step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_lora.sharding.collectives import largest_of_ranks
from lightning_lora.trainer_access import move_last, run_folder

from .spared_workers import spare_workers

FILE = "stopped.ckpt"


class GracefulStop(Callback):
    """SIGTERM and Ctrl-C finish the running optimizer step, save ``stopped.ckpt`` and end with code 143 or 130.

    A second Ctrl-C stops at once; further SIGTERMs change nothing, schedulers send several. With several processes it
    is enough that one of them is told: all finish the same step. A validation that is running is cut short on one
    device and finished on several. Before the first step and outside ``fit`` there is nothing to save, and a signal
    stops at once. Continue with ``ckpt_path``.

    Replaces Lightning's own answer to SIGTERM in ``fit``, which ends with code 0 and saves nothing. The signal by which
    SLURM announces a requeue waits for the end of a step too, then Lightning answers it. Signals can only be received
    in the main thread, and not under ``ddp_spawn``, whose main process does not train.

    Args:
        dirpath: Where the checkpoint goes. None: beside those of ``ModelCheckpoint``, else ``checkpoints`` in the run
            folder.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self._received: int = 0
        self._training = False
        self._last_step = 0
        self._process = 0
        self._before_validation = torch.empty(0)
        self._trainer: Trainer | None = None
        self._replaced: dict[int, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go behind all other callbacks: what they do after a batch belongs into the checkpoint.

        Workers are spared now: ``estimated_stepping_batches`` starts them before any later hook.
        """
        move_last(trainer, self)
        if stage == "fit":
            spare_workers(trainer)
            self._received, self._trainer, self._process = 0, trainer, os.getpid()

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen: Lightning has just set its own handlers."""
        self._listen(signal.SIGINT, signal.SIGTERM)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a signal waits for the end of a step."""
        self._listen(signal.SIGINT, signal.SIGTERM, *_requeue_signal(trainer))
        self._last_step = trainer.global_step
        self._training = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if asked to, unless the batch was not the last of its optimizer step."""
        self._before_validation = torch.get_rng_state()
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._stop_if_asked(trainer)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop if asked to, on one device: others may have different numbers of validation batches."""
        if self._training and self._received and trainer.world_size == 1:
            # The run that goes on will validate from the start, and a validation draws random numbers.
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._before_validation)
                self._stop_if_asked(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if asked to during validation."""
        if self._training:
            self._stop_if_asked(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is left to finish."""
        self._training = False

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Nothing will be finished."""
        self._training = False

    def _stop_if_asked(self, trainer: Trainer) -> None:
        signum = int(largest_of_ranks(trainer, torch.tensor(self._received)))
        if signum in _requeue_signal(trainer):
            self._received = 0
            self._replaced[signum](signum, None)
        elif signum:
            self._save(trainer, signum)
            raise _end(trainer, signum)

    def _save(self, trainer: Trainer, signum: int) -> None:
        path = os.path.join(self._folder(trainer), FILE)  # not Path: it may be a remote one
        trainer.save_checkpoint(path, weights_only=False)
        rank_zero_info(
            f"stopped by {signal.Signals(signum).name} after optimizer step {trainer.global_step}; "
            f"continue by the same command with --ckpt_path {path}"
        )

    def _folder(self, trainer: Trainer) -> str:
        beside = self.dirpath or getattr(trainer.checkpoint_callback, "dirpath", None)
        return beside or os.path.join(run_folder(trainer), "checkpoints")

    def _listen(self, *signums: int) -> None:
        """Until the run ends: Lightning then puts back every handler that it found."""
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("GracefulStop does nothing: signals only reach the main thread, and this is another one.")
            return
        for signum in signums:
            self._replaced[signum] = signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # Processes forked from this one have inherited the handler, and must die when they are told to.
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        elif not self._training or (self._received and signum == signal.SIGINT):
            self._stop_at_once(signum)
        elif not self._received:
            self._received = signum
            hint = " Once more stops at once." if signum == signal.SIGINT else ""
            text = f"\n{signal.Signals(signum).name}: finishing the optimizer step, then saving.{hint}\n"
            os.write(2, text.encode())  # not print: the signal may have come in the middle of one

    def _stop_at_once(self, signum: int) -> None:
        trainer = self._trainer
        assert trainer is not None
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
        raise _end(trainer, signum)


def _requeue_signal(trainer: Trainer) -> tuple[int, ...]:
    """What Lightning requeues a SLURM job by, if it does."""
    environment = trainer._accelerator_connector.cluster_environment  # strategies of one device do not have it
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
        return (environment.requeue_signal,)
    return ()


def _end(trainer: Trainer, signum: int) -> SystemExit:
    """The exception that ends the process: code 128 + signal, as shells and schedulers expect."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    # The first process started the others, and kills everything, itself included, when one of them ends with an error.
    started_by_us = trainer.local_rank > 0 and isinstance(environment, LightningEnvironment)
    return SystemExit(0 if started_by_us else 128 + signum)
