"""Runs in real processes that are told to stop, lose a process, or meet another run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests import toys
from tests.cli.test_commands import EMBEDDED, configs, tree
from tests.integration import faulty
from tests.integration.test_distributed import free_port

SCRIPT = Path(faulty.__file__)
LIMIT = 60.0
"""Seconds within which a disturbed run must have ended."""


class Run:
    """A run in processes of its own, and what they have printed."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.printed = folder / f"printed-{time.monotonic_ns()}.txt"
        environment = {"PYTHONPATH": str(toys.ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"MASTER_PORT": free_port(), "PYTHONWARNINGS": "ignore"}
        with open(self.printed, "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
                cwd=folder,
            )

    @property
    def text(self) -> str:
        return self.printed.read_text()

    def wait_for(self, pattern: str, seconds: float = 120.0) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.text):
                return found
            assert self.process.poll() is None, self.text
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in {seconds} s:\n{self.text}")

    def pid(self, rank: int, step: int = 3) -> int:
        return int(self.wait_for(rf"rank {rank} pid (\d+) step {step} ")[1])

    def code(self) -> int:
        """The exit code of the first process, when none of the run is left."""
        code = self.process.wait(LIMIT)
        deadline = time.monotonic() + LIMIT
        while is_alive(self.process.pid):
            assert time.monotonic() < deadline, "processes of the run are left"
            time.sleep(0.05)
        return code


def is_alive(group: int) -> bool:
    """Whether a process group has a process that runs; one that has ended may wait for its parent for ever."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(int(found) == group and state[0] != "Z" for found, state in map(str.split, listed.splitlines()))


@contextmanager
def run(folder: Path, *command: str) -> Iterator[Run]:
    started = Run(folder, *command)
    try:
        yield started
    finally:
        if is_alive(started.process.pid):
            os.killpg(started.process.pid, signal.SIGKILL)
        started.process.wait()


def train(folder: Path, *options: str) -> list[str]:
    return [str(SCRIPT), str(folder), *options]


def last_step(text: str) -> int:
    return max(int(step) for step in re.findall(r" step (\d+) ", text))


def finished(folder: Path, *command: str) -> str:
    with run(folder, *command) as resumed:
        assert resumed.code() == 0, resumed.text
        return resumed.text


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_exits_with_the_code_of_the_signal_and_continues(signum: int, code: int, tmp_path: Path) -> None:
    with run(tmp_path, *train(tmp_path)) as stopped:
        os.kill(stopped.pid(0), signum)
        assert stopped.code() == code, stopped.text
        assert f"stopped by {signal.Signals(signum).name} after optimizer step" in stopped.text
        step = last_step(stopped.text)
    path = tmp_path / "checkpoints" / "stopped.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] in (step, step + 1)  # it may end before it reports
    assert not (tmp_path / ".run.lock").exists()
    text = finished(tmp_path, *train(tmp_path, f"--resume={path}", f"--steps={step + 5}", "--seconds=0"))
    assert last_step(text) == step + 5
    assert min(int(found) for found in re.findall(r" step (\d+) ", text)) > step


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_long_step(tmp_path: Path) -> None:
    with run(tmp_path, *train(tmp_path, "--seconds=20")) as stopped:
        time.sleep(15)  # within the first step
        os.kill(stopped.process.pid, signal.SIGINT)
        stopped.wait_for("finishing the optimizer step")
        begun = time.monotonic()
        os.kill(stopped.process.pid, signal.SIGINT)
        assert stopped.code() == 130, stopped.text
        assert time.monotonic() - begun < 10
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("told", ["first", "second", "all", "ctrl-c"])
def test_two_ranks_stop_after_the_same_step_whoever_is_told(told: str, strategy: str, tmp_path: Path) -> None:
    with run(tmp_path, *train(tmp_path, f"--strategy={strategy}")) as stopped:
        ranks = [stopped.pid(rank) for rank in (0, 1)]
        if told in ("first", "second"):
            os.kill(ranks[told == "second"], signal.SIGTERM)
        else:
            os.killpg(stopped.process.pid, signal.SIGINT if told == "ctrl-c" else signal.SIGTERM)
        assert stopped.code() == (130 if told == "ctrl-c" else 143), stopped.text
    path = tmp_path / "checkpoints" / "stopped.ckpt"
    step = torch.load(path, weights_only=True)["global_step"]
    text = finished(tmp_path, *train(tmp_path, f"--resume={path}", f"--steps={step + 2}", "--seconds=0"))
    assert last_step(text) == step + 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("killed", [0, 1])
def test_the_other_rank_ends_when_one_is_killed_and_says_which(killed: int, strategy: str, tmp_path: Path) -> None:
    with run(tmp_path, *train(tmp_path, f"--strategy={strategy}")) as broken:
        ranks = [broken.pid(rank) for rank in (0, 1)]
        os.kill(ranks[killed], signal.SIGKILL)
        assert broken.code() not in (0, 143), broken.text
        how = "was killed by SIGKILL" if killed else "is gone"
        assert f"[rank {1 - killed}] rank {killed} (process {ranks[killed]}) {how}; the run cannot go on" in broken.text


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run(tmp_path: Path) -> None:
    """For the other it is what a lost machine is under NCCL: a collective that never returns."""
    with run(tmp_path, *train(tmp_path, "--strategy=ddp", "--timeout=6")) as broken:
        os.kill(broken.pid(1), signal.SIGSTOP)
        assert broken.code() == 1, broken.text
        assert re.search(r"\[rank 0\] rank 1 gave no sign of life for \d+ s; the run cannot go on", broken.text)


@pytest.mark.slow
def test_a_killed_data_worker_ends_the_run_and_is_named(tmp_path: Path) -> None:
    with run(tmp_path, *train(tmp_path, "--workers=2")) as broken:
        worker = broken.wait_for(r"step 3 workers \[(\d+), \d+\]")[1]
        os.kill(int(worker), signal.SIGKILL)
        assert broken.code() == 1, broken.text
        assert f"DataLoader worker (pid {worker}) is killed by signal: Killed" in broken.text


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_nan_on_one_rank_stops_both_with_the_name(strategy: str, tmp_path: Path) -> None:
    with run(tmp_path, *train(tmp_path, f"--strategy={strategy}", "--nan-at=3", "--seconds=0")) as broken:
        assert broken.code() != 0, broken.text
        words = (
            r"GradientError: the gradient of 'net.first.lora_A' is .*in optimizer step 4, made of batch 3 of epoch 0"
        )
        assert len(re.findall(words, broken.text)) == 2, broken.text
        assert last_step(broken.text) == 3


COMMAND = [
    *("-m", "lightning_lora", "fit", *configs("sft.yaml", "lora.yaml"), *EMBEDDED),
    *("--trainer.callbacks+=lightning_lora.callbacks.LoRAProgressBar", "--trainer.callbacks.every_n_steps=1"),
    *("--data.init_args.max_rows=64", "--trainer.max_epochs=100", "--trainer.limit_val_batches=0"),
    *("--trainer.logger.init_args.version=one", "--trainer.logger.init_args.flush_logs_every_n_steps=1"),
]


@pytest.mark.slow
def test_the_command_stops_with_a_checkpoint_and_refuses_a_second_run_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "sft" / "one"
    with run(tmp_path, *COMMAND) as first:
        first.wait_for("step 3 ")
        before = tree(folder)["config.yaml"]
        first.wait_for("step 5 ")
        with run(tmp_path, *COMMAND, "--seed_everything=7") as second:
            assert second.code() == 2, second.text
            assert f"error: another run writes in runs/sft/one: process {first.process.pid} on " in second.text
            assert "Traceback" not in second.text
        assert tree(folder)["config.yaml"] == before
        os.kill(first.process.pid, signal.SIGTERM)
        assert first.code() == 143, first.text
    rows = (folder / "metrics.csv").read_text().splitlines()
    path = folder / "checkpoints" / "stopped.ckpt"
    step = torch.load(path, weights_only=True)["global_step"]
    assert len(rows) == 1 + step - 1, "the header, and no row for the last step"
    again = [*COMMAND, f"--ckpt_path={path}", f"--trainer.max_steps={step + 3}"]
    assert f"step {step + 3}/{step + 3}" in finished(tmp_path, *again)
