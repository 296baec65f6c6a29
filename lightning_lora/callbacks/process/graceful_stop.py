"""A run that a signal stops: it ends after its optimizer step, with a checkpoint."""

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
from lightning_lora.this_command import this_command
from lightning_lora.trainer_access import move_last, run_folder

from .spared_workers import spare_workers

FILE = "stopped.ckpt"


class GracefulStop(Callback):
    """Answers SIGTERM and Ctrl-C: finishes the optimizer step, saves ``stopped.ckpt``, exits with code 143 or 130.

    The checkpoint goes beside those of ``ModelCheckpoint``, else into ``checkpoints`` in the run folder; continue from
    it with ``ckpt_path``. A second Ctrl-C stops at once; further SIGTERMs change nothing, as schedulers send several.
    With several processes a signal to any of them is enough: all finish the same step. A running validation is cut
    short on one device and finished on several. Before the first step and outside ``fit`` there is nothing to save, and
    a signal stops at once.

    In ``fit`` this replaces Lightning's own answer to SIGTERM, which exits with code 0 and saves nothing. The signal by
    which SLURM announces a requeue waits for the end of the step too, and is then answered by Lightning. Signals reach
    the main thread only, and under ``ddp_spawn`` the main process does not train, so no checkpoint is saved there.
    """

    def __init__(self) -> None:
        # False where somebody else receives the signals, and calls `ask`: for a run outside of the main thread.
        self.listens = True
        self._received = 0
        self._training = False
        self._last_step = 0
        self._process = 0
        self._before_validation = torch.empty(0)
        self._trainer: Trainer | None = None
        self._replaced: dict[int, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind all other callbacks: the checkpoint must hold what they do after a batch."""
        move_last(trainer, self)
        if stage == "fit":
            spare_workers(trainer)  # here: ``estimated_stepping_batches`` may start workers before any later hook
            self._received, self._trainer, self._process = 0, trainer, os.getpid()

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals, after Lightning has set its own handlers."""
        self._listen(signal.SIGINT, signal.SIGTERM)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let signals wait for the end of an optimizer step from now on."""
        self._listen(signal.SIGINT, signal.SIGTERM, *_requeue_signal(trainer))
        self._last_step = trainer.global_step
        self._training = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if a signal came, at the end of an optimizer step."""
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
        """Stop if a signal came, on one device: several ranks may have different numbers of validation batches."""
        if self._training and self._received and trainer.world_size == 1:
            # The resumed run validates from the start, so it needs the random state from before this validation.
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._before_validation)
                self._stop_if_asked(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if a signal came during validation."""
        if self._training:
            self._stop_if_asked(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let signals stop at once again: no step is left to finish."""
        self._training = False

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let signals stop at once again: no step will be finished."""
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
        beside = getattr(trainer.checkpoint_callback, "dirpath", None)
        # Not Path, as the folder may be remote.
        path = os.path.join(beside or os.path.join(run_folder(trainer), "checkpoints"), FILE)
        trainer.save_checkpoint(path, weights_only=False)
        how = f"type:\n  {this_command(path)}" if "fit" in sys.argv[1:] else f"call fit(..., ckpt_path={path!r})"
        rank_zero_info(
            f"stopped by {signal.Signals(signum).name} after optimizer step {trainer.global_step}; to continue, {how}"
        )

    def ask(self, signum: int) -> bool:
        """Stop after this optimizer step, as by a signal; returns whether the run trains, and will do so."""
        if self._training:
            self._received = signum
        return self._training

    def _listen(self, *signums: int) -> None:
        """Receive these signals until the run ends, when Lightning restores every handler that it found."""
        if not self.listens:
            return
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("GracefulStop does nothing: signals reach the main thread, and training runs in another.")
            return
        for signum in signums:
            self._replaced[signum] = signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A process forked from this one inherits the handler, and must die of the signal.
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        elif not self._training or (self._received and signum == signal.SIGINT):
            self._stop_at_once(signum)
        elif not self._received:
            self._received = signum
            hint = " Once more stops at once." if signum == signal.SIGINT else ""
            text = f"\n{signal.Signals(signum).name}: finishing the optimizer step, then saving.{hint}\n"
            os.write(2, text.encode())  # not print: the signal may have interrupted a print

    def _stop_at_once(self, signum: int) -> None:
        trainer = self._trainer
        assert trainer is not None
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
        raise _end(trainer, signum)


def _requeue_signal(trainer: Trainer) -> tuple[int, ...]:
    """The signal on which Lightning requeues a SLURM job; empty where it does not."""
    environment = trainer._accelerator_connector.cluster_environment  # strategies of one device have no such attribute
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
        return (environment.requeue_signal,)
    return ()


def _end(trainer: Trainer, signum: int) -> SystemExit:
    """The exception that ends the process with code 128 + signal, as shells and schedulers expect."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    # A process started by Lightning's launcher ends with 0: at an error the first process kills all, itself included.
    started_by_launcher = trainer.local_rank > 0 and isinstance(environment, LightningEnvironment)
    return SystemExit(0 if started_by_launcher else 128 + signum)
