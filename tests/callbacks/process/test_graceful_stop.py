"""A signal ends the run after its optimizer step, with a checkpoint that the run continues from."""

from __future__ import annotations

import csv
import functools
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_lora.callbacks import GracefulStop
from tests.support import resuming, toys
from tests.support.toys import Toy

pytestmark = toys.expected_warnings

CODES: dict[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Send(Callback):
    """Sends signals to this process in one hook, and counts finished batches."""

    def __init__(self, *signums: int, at: int = 0, hook: str = "train") -> None:
        self.signums, self.at, self.hook = signums, at, hook
        self.finished = self.validated = 0

    def send(self, hook: str, batch_idx: int) -> None:
        if (hook, batch_idx) == (self.hook, self.at):
            for signum in self.signums:
                os.kill(os.getpid(), signum)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.send("train", batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.finished += 1

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.send("sanity" if trainer.sanity_checking else "validation", batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.validated += 1

    def state_dict(self) -> dict[str, Any]:
        return {"finished": self.finished}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the signal handlers after each test."""
    before = {signum: signal.getsignal(signum) for signum in CODES}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def stopped(folder: Path, send: Send, code: int, module: Toy | None = None, **options: Any) -> Path:
    """Run until the signal; returns the path where the checkpoint should be."""
    settings = {"max_epochs": 2, "enable_checkpointing": False} | options
    callbacks = [GracefulStop(), send, *settings.pop("callbacks", [])]
    runner = toys.trainer(folder, callbacks=callbacks, **settings)
    with pytest.raises(SystemExit) as exit:
        runner.fit(module or Toy(), toys.loader(), toys.loader(6) if "validation" in send.hook else None)
    assert exit.value.code == code
    return folder / "checkpoints" / "stopped.ckpt"


def content(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("signum", CODES)
def test_a_signal_waits_for_the_end_of_the_optimizer_step(signum: int, tmp_path: Path) -> None:
    send = Send(signum, at=2)
    path = stopped(tmp_path, send, CODES[signum], accumulate_grad_batches=2)
    assert send.finished == 4
    assert content(path)["global_step"] == 2
    # The checkpoint holds what other callbacks do after the batch, though they come later in the list.
    assert content(path)["callbacks"]["Send"] == {"finished": 4}


class TellAll(Callback):
    """Lets another process signal all data workers and then this process, in the second epoch."""

    def __init__(self, hook: str, *at: int) -> None:
        self.place = (hook, *at)

    def tell(self, trainer: Trainer, *place: object) -> None:
        if trainer.current_epoch == 1 and place == self.place:
            pids = [*(child.pid for child in multiprocessing.active_children()), os.getpid()]
            subprocess.run(["kill", *map(str, pids)], check=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.tell(trainer, "train", batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.tell(trainer, "validation", trainer.fit_loop.batch_idx, batch_idx)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "workers"), [(("train", 4), 2), (("train", 6), 0), (("validation", 3, 0), 0)])
def test_the_run_that_goes_on_is_bit_equal_to_one_never_stopped(place: Any, workers: int, tmp_path: Path) -> None:
    """Places in the middle of an epoch, in a short last window, and in a validation; windows have three batches."""
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "val_check_interval": 4}
    loader = functools.partial(resuming.shuffled, num_workers=workers)
    whole = resuming.run(resuming.DiceyLoRA, tmp_path, loader=loader, **options)
    resuming.seed_all(0)
    runner = toys.trainer(tmp_path, callbacks=[GracefulStop(), TellAll(*place)], max_epochs=3, **options)
    with pytest.raises(SystemExit, match="143"):
        runner.fit(resuming.DiceyLoRA(), loader(), toys.loader(4, seed=3))
    path = tmp_path / "checkpoints" / "stopped.ckpt"
    assert content(path)["global_step"] == {3: 4, 4: 5, 6: 6}[place[1]]
    resumed = resuming.run(resuming.DiceyLoRA, tmp_path, path, loader=loader, **options)
    assert resuming.unlike(whole, resumed) == []


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    send = Send(signal.SIGINT, signal.SIGINT, at=1)
    path = stopped(tmp_path, send, 130)
    assert send.finished == 1
    assert not path.exists()


def test_many_sigterms_are_one(tmp_path: Path) -> None:
    path = stopped(tmp_path, Send(*[signal.SIGTERM] * 3, at=1), 143)
    assert content(path)["global_step"] == 2


def test_ctrl_c_while_a_sigterm_waits_stops_at_once(tmp_path: Path) -> None:
    assert not stopped(tmp_path, Send(signal.SIGTERM, signal.SIGINT, at=1), 130).exists()


def test_validation_is_cut_short(tmp_path: Path) -> None:
    send = Send(signal.SIGTERM, at=1, hook="validation")
    path = stopped(tmp_path, send, 143)
    assert (send.finished, send.validated) == (4, 2)
    assert content(path)["global_step"] == 4


@pytest.mark.parametrize("signum", CODES)
def test_before_the_first_step_it_stops_at_once(signum: int, tmp_path: Path) -> None:
    send = Send(signum, hook="sanity")
    runner = toys.trainer(tmp_path, callbacks=[GracefulStop(), send], num_sanity_val_steps=2)
    with pytest.raises(SystemExit) as exit:
        runner.fit(Toy(), toys.loader(), toys.loader())
    assert exit.value.code == CODES[signum]
    assert (send.finished, send.validated) == (0, 0)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_checkpoint_stands_beside_those_of_the_run_and_logged_rows_are_kept(tmp_path: Path) -> None:
    class Logging(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=100)
    kept = ModelCheckpoint(tmp_path / "kept")
    options = {"logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True, "callbacks": [kept]}
    stopped(tmp_path, Send(signal.SIGTERM, at=2), 143, Logging(), **options)
    assert (tmp_path / "kept" / "stopped.ckpt").is_file()
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1"]  # the step's own row comes later


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_signals_do_what_they_did_before(fails: bool, tmp_path: Path) -> None:
    class Failing(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if fails:
                raise ZeroDivisionError

    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    # A shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runner = toys.trainer(tmp_path, callbacks=[GracefulStop(), Failing()])
    if fails:
        with pytest.raises(ZeroDivisionError):
            runner.fit(Toy(), toys.loader())
    else:
        runner.fit(Toy(), toys.loader())
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_processes_that_the_run_forks_still_die_when_they_are_told_to(tmp_path: Path) -> None:
    codes: list[int | None] = []

    def wait(says: Any) -> None:
        says.send("started")
        time.sleep(60)

    class Helped(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for signum in CODES:
                hears, says = multiprocessing.Pipe()
                helper = multiprocessing.get_context("fork").Process(target=wait, args=(says,))
                helper.start()
                hears.recv()
                assert helper.pid is not None
                os.kill(helper.pid, signum)
                helper.join(30)
                codes.append(helper.exitcode)
            return super().training_step(batch, batch_idx)

    toys.trainer(tmp_path, callbacks=[GracefulStop()], max_steps=1).fit(Helped(), toys.loader())
    assert codes == [-signum for signum in CODES]


def test_a_slurm_job_is_requeued_after_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning saves the checkpoint that it loads when the job starts again."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    job = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    send = Send(signal.SIGUSR1, at=0)
    slurm = {"plugins": [SLURMEnvironment(auto_requeue=True)], "accumulate_grad_batches": 2}
    toys.trainer(tmp_path, callbacks=[GracefulStop(), send], **slurm).fit(Toy(), toys.loader())
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert content(tmp_path / "hpc_ckpt_1.ckpt")["global_step"] == 1
    assert content(tmp_path / "hpc_ckpt_1.ckpt")["callbacks"]["Send"] == {"finished": 2}
    # Then SLURM ends the job, here after it has started again by itself.
    assert content(stopped(tmp_path, Send(signal.SIGTERM, at=0), 143, **slurm))["global_step"] == 3
