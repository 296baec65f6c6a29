"""Real processes that are told to stop, lose a process, meet a NaN or another run; and go on afterwards."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.scripts.disturbed import Run, run, training
from tests.support.commands import EMBEDDED, configs
from tests.support.toys import tree

pytestmark = pytest.mark.slow


def stopped(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a run that was told to stop, and what is in it."""
    [path] = folder.rglob("stopped.ckpt")
    return path, torch.load(path, weights_only=True)


def is_finite(checkpoint: Path) -> bool:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return all(bool(tensor.isfinite().all()) for tensor in state.values())


def ends_in_order(told: Run, signum: int) -> None:
    """As `stopped.ckpt` and the exit code say; nothing else is printed than what was done and how to go on."""
    assert told.code() == 128 + signum, told.text
    name = signal.Signals(signum).name
    assert re.search(rf"\n{name}: finishing the optimizer step, then saving", told.text), told.text
    assert len(re.findall(rf"stopped by {name} after optimizer step \d+; to continue, (?:type|call)", told.text)) == 1
    assert "Traceback" not in told.text


def test_a_run_with_data_workers_loses_one_goes_on_and_is_told_to_stop_with_all_its_processes(tmp_path: Path) -> None:
    with run(tmp_path, *training(tmp_path, "--workers=2")) as broken:
        worker = broken.worker()
        os.kill(worker, signal.SIGKILL)
        assert broken.code() == 1, broken.text
        assert f"DataLoader worker (pid {worker}) is killed by signal: Killed" in broken.text
    with run(tmp_path, *training(tmp_path, "--workers=2", "--resume=last")) as told:
        told.pid(0)
        assert min(told.steps) >= max(broken.steps)
        told.tell_all(signal.SIGTERM)
        ends_in_order(told, signal.SIGTERM)
    path, content = stopped(tmp_path)
    assert content["global_step"] == max(told.steps)
    assert not (tmp_path / ".run.lock").exists()
    with run(tmp_path, *training(tmp_path, "--workers=2", f"--resume={path}")) as resumed:
        resumed.pid(0)
        assert min(resumed.steps) == content["global_step"] + 1
        resumed.tell_all(signal.SIGINT)  # Ctrl-C
        ends_in_order(resumed, signal.SIGINT)


def test_a_second_ctrl_c_ends_a_long_step(tmp_path: Path) -> None:
    with run(tmp_path, *training(tmp_path, "--seconds=60")) as impatient:
        impatient.wait_for("begins batch 0")
        os.kill(impatient.process.pid, signal.SIGINT)
        impatient.wait_for("finishing the optimizer step")
        os.kill(impatient.process.pid, signal.SIGINT)
        assert impatient.code() == 130, impatient.text
        assert not impatient.steps, "the step of a minute was waited for"
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(("strategy", "victim"), [("ddp", 1), ("fsdp2", 0)])
def test_two_ranks_lose_one_go_on_are_told_to_stop_go_on_and_meet_a_nan(
    strategy: str, victim: int, tmp_path: Path
) -> None:
    def command(*options: str) -> list[str]:
        return training(tmp_path, f"--strategy={strategy}", *options)

    with run(tmp_path, *command()) as broken:
        ranks = [broken.pid(rank) for rank in (0, 1)]
        os.kill(ranks[victim], signal.SIGKILL)
        assert broken.code() not in (0, 143), broken.text
    end = "was killed by SIGKILL" if victim else "is gone"
    assert f"[rank {1 - victim}] rank {victim} (process {ranks[victim]}) {end}; the run cannot go on" in broken.text

    # Lightning starts the second process, which ends first, and looks every 5 seconds whether it has failed; or both
    # are started from outside, as on a cluster.
    started, linger = (1, 6) if strategy == "ddp" else (2, 0)
    with run(tmp_path, *command("--resume=last", f"--linger={linger}"), ranks=started) as told:
        ranks = [told.pid(rank) for rank in (0, 1)]
        assert min(told.steps) >= max(broken.steps)
        os.kill(ranks[1 - victim], signal.SIGTERM)  # it is enough to tell one
        ends_in_order(told, signal.SIGTERM)
    path, content = stopped(tmp_path)
    step = content["global_step"]
    assert step == max(told.steps)

    # On the last rank only: under FSDP2 it alone holds the part with the NaN.
    with run(tmp_path, *command(f"--resume={path}", f"--nan-at={step + 2}", "--seconds=0"), ranks=2) as lost:
        assert lost.code() == 1, lost.text
    words = rf"GradientError: the gradient of 'net.first.lora_A' is .* step {step + 3}, made of batch {step + 2} of"
    assert len(re.findall(words, lost.text)) == 2, lost.text
    assert max(lost.steps) == step + 2
    checkpoints = list(tmp_path.rglob("*.ckpt"))
    assert {"kept.ckpt", "last.ckpt", "stopped.ckpt"} <= {checkpoint.name for checkpoint in checkpoints}
    assert all(map(is_finite, checkpoints))


def test_a_rank_that_hangs_ends_the_run_and_a_suspended_run_goes_on(tmp_path: Path) -> None:
    """For the other rank it is what a lost machine is under NCCL: a collective that never returns."""
    with run(tmp_path, *training(tmp_path, "--strategy=ddp", "--timeout=5", "--grace=1")) as broken:
        ranks = [broken.pid(rank) for rank in (0, 1)]
        broken.tell_all(signal.SIGSTOP)
        time.sleep(6)
        broken.tell_all(signal.SIGCONT)
        broken.wait_for(rf"rank 1 step {max(broken.steps) + 10} ")
        os.kill(ranks[1], signal.SIGSTOP)
        assert broken.code() == 1, broken.text
        assert re.search(r"\[rank 0\] rank 1 gave no sign of life for \d+ s; the run cannot go on", broken.text)


COMMAND = [
    *("-m", "lightning_lora", "fit", *configs("sft.yaml", "lora.yaml"), *EMBEDDED),
    *("--trainer.callbacks+=lightning_lora.callbacks.LoRAProgressBar", "--trainer.callbacks.every_n_steps=1"),
    *("--data.init_args.max_rows=64", "--trainer.max_epochs=100", "--trainer.limit_val_batches=0"),
    *("--trainer.logger.init_args.version=one", "--trainer.logger.init_args.flush_logs_every_n_steps=1"),
]


def test_the_command_stops_with_a_checkpoint_goes_on_and_refuses_a_second_run_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "sft" / "one"
    with run(tmp_path, *COMMAND) as first:
        first.wait_for("step 3 ")
        before = tree(folder)["config.yaml"]
        with run(tmp_path, *COMMAND, "--seed_everything=7") as second:
            assert second.code() == 2, second.text
            assert f"error: another run writes in runs/sft/one: process {first.process.pid} on " in second.text
            assert "Traceback" not in second.text
        assert tree(folder)["config.yaml"] == before
        os.kill(first.process.pid, signal.SIGTERM)
        ends_in_order(first, signal.SIGTERM)
    _, content = stopped(tmp_path)
    step = content["global_step"]
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + step - 1, "the header, and no row for the last step"
    (typed,) = re.findall(r"to continue, type:\n  lightning-lora (.*)", first.text)
    with run(tmp_path, "-m", "lightning_lora", *shlex.split(typed)) as again:
        found = again.wait_for(r"step (\d+) ")
        assert int(found[1]) == step + 1, again.text
        again.tell_all(signal.SIGINT)
        ends_in_order(again, signal.SIGINT)
