"""What is saved for exact resume: every part of it is needed, and what cannot be read is refused or said."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch.loops import evaluation_loop, fit_loop, training_epoch_loop

from lightning_lora.checkpoints import loop_position
from lightning_lora.checkpoints.random_state import random_state, set_random_state
from lightning_lora.checkpoints.resume import RESUME_KEY, RunMemory
from tests.support import resuming, toys
from tests.support.resuming import NUM_BATCHES, DiceyFull, DiceyLoRA, run, shuffled, unlike

CPU = torch.device("cpu")

pytestmark = [*toys.expected_warnings, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")]


def test_a_file_written_by_other_ranks_is_read_with_a_warning(tmp_path: Path) -> None:
    run(DiceyLoRA, tmp_path)
    checkpoint = torch.load(tmp_path / "batch-1-4.ckpt", weights_only=True)
    checkpoint[RESUME_KEY]["ranks"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="written by 2 ranks and is read by 1: random numbers start anew"):
        run(DiceyLoRA, tmp_path, tmp_path / "two.ckpt")


def test_a_newer_format_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    memory = RunMemory()
    with pytest.warns(UserWarning, match="resume format 99 is newer than 1"):
        memory.load(toys.Toy(), {RESUME_KEY: {"format": 99}})
    assert memory.loaded is None


def test_files_of_weights_only_hold_no_random_numbers(tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path)
    trainer.fit(DiceyFull(), shuffled(), toys.loader(4))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert RESUME_KEY not in torch.load(tmp_path / "a.ckpt", weights_only=True)


def test_a_window_that_is_closed_is_not_saved(tmp_path: Path) -> None:
    run(DiceyLoRA, tmp_path, accumulate_grad_batches=3)
    gradients = {
        batch: torch.load(tmp_path / f"batch-0-{batch}.ckpt", weights_only=True)[RESUME_KEY]["ranks"][0]["gradients"]
        for batch in range(1, NUM_BATCHES + 1)
    }
    assert [batch for batch, saved in gradients.items() if saved] == [1, 2, 4, 5]
    assert all("lora_" in name or "weight" in name or "bias" in name for name in gradients[1])


def test_lightning_calls_its_stages_what_we_call_them() -> None:
    assert fit_loop.RestartStage.RESTARTED_MID_EPOCH == loop_position._MID_EPOCH
    assert training_epoch_loop.RestartStage.RESTARTED_ON_LAST == loop_position._ON_LAST
    assert evaluation_loop.RestartStage.RESTARTED_MID_EVALUATION == loop_position._MID_EVALUATION
    for loop in (fit_loop, training_epoch_loop, evaluation_loop):
        assert loop.RestartStage.NONE == loop_position._NONE


def test_a_lightning_with_other_loops_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"exact resume knows Lightning 2.6; Lightning 2.* has no Loop.restarting"):
        loop_position._set(type("Loop", (), {})(), restarting=True)


def test_random_states_come_back() -> None:
    resuming.seed_all(5)
    draws = lambda: (random.random(), random.gauss(0, 1), numpy.random.randn(), torch.rand(2).tolist())  # noqa: E731
    draws()
    state = random_state(CPU)
    expected = draws(), draws()
    set_random_state(state, CPU)
    assert (draws(), draws()) == expected


# Each part of what we save is needed: without it the run that goes on is another one.
LOSSES: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "random numbers": ("batch-1-3", lambda entry: entry["ranks"][0].update(random=random_state(CPU))),
    "numpy's only": (
        "batch-1-3",
        lambda entry: entry["ranks"][0]["random"].update(numpy=random_state(CPU)["numpy"]),
    ),
    "python's only": (
        "batch-1-3",
        lambda entry: entry["ranks"][0]["random"].update(python=random_state(CPU)["python"]),
    ),
    "random numbers at the end of an epoch": (
        "epoch-0",
        lambda entry: entry["ranks"][0].update(random=random_state(CPU)),
    ),
    "where the epoch began": ("batch-1-3", lambda entry: entry["ranks"][0].update(before_iterators=random_state(CPU))),
    "gradients": ("batch-1-4", lambda entry: entry["ranks"][0].update(gradients={})),
    "position": ("batch-1-3", lambda entry: entry["position"].update(num_batches=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("lost", LOSSES)
def test_every_part_of_what_is_saved_is_needed(lost: str, tmp_path: Path) -> None:
    place, lose = LOSSES[lost]
    whole = run(DiceyLoRA, tmp_path, accumulate_grad_batches=3, val_check_interval=3)
    checkpoint = torch.load(tmp_path / f"{place}.ckpt", weights_only=True)
    lose(checkpoint[RESUME_KEY])
    torch.save(checkpoint, tmp_path / "less.ckpt")
    resumed = run(DiceyLoRA, tmp_path, tmp_path / "less.ckpt", accumulate_grad_batches=3, val_check_interval=3)
    assert unlike(whole, resumed)
