from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import numpy
import pytest
import torch

from lightning_lora.study.bank.process_state import seed_all
from lightning_lora.study.bank.turns import Seat, Turns
from tests.support import warm


def draws(seed: int, seat: Seat | None = None) -> list[float]:
    seed_all(seed)
    found = []
    for _ in range(3):
        found += [random.random(), float(numpy.random.rand()), float(torch.rand(()))]
        if seat is not None:
            seat.pass_turn()
    return found


def test_each_function_draws_the_random_numbers_that_it_draws_alone() -> None:
    expected = {str(seed): draws(seed) for seed in (1, 2, 3)}
    seed_all(7)
    before = random.random(), torch.rand(())
    seed_all(7)
    seats = Turns().run({str(seed): lambda seat, seed=seed: draws(seed, seat) for seed in (1, 2, 3)})
    assert {seat.name: seat.result for seat in seats} == expected
    assert (random.random(), torch.rand(())) == before, "those of the caller are as they were"


def test_functions_take_turns_and_one_that_fails_leaves_the_others_alone() -> None:
    seen: list[str] = []

    def walk(seat: Seat) -> str:
        for step in range(3):
            seen.append(f"{seat.name}{step}")
            if seat.name == "b" and step == 1:
                raise ValueError("b is broken")
            seat.pass_turn()
        return seat.name

    seats = Turns().run(dict.fromkeys("abc", walk))
    assert seen == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "c2"]
    assert [seat.result for seat in seats] == ["a", None, "c"]
    assert str(seats[1].error) == "b is broken"


def test_functions_that_meet_are_served_once_all_of_them_wait() -> None:
    groups: list[list[str]] = []

    def serve(seats: list[Seat]) -> None:
        groups.append([seat.name for seat in seats])
        for seat in seats:
            seat.waits_for = None

    def walk(seat: Seat) -> None:
        for _ in range(1 if seat.name == "b" else 2):
            seat.pass_turn()
            seat.meet("here", serve)  # type: ignore[arg-type]

    assert all(seat.error is None for seat in Turns().run(dict.fromkeys("abc", walk)))
    assert [sorted(group) for group in groups] == [["a", "b", "c"], ["a", "c"]]


def test_the_time_of_others_does_not_count() -> None:
    def walk(seat: Seat) -> float:
        for _ in range(3):
            if seat.name == "slow":
                time.sleep(0.05)
            seat.pass_turn()
        return seat.seconds()

    quick, slow = (seat.result for seat in Turns().run(dict.fromkeys(("quick", "slow"), walk)))
    assert quick < 0.1 < slow


STOPPED = """
import signal, sys, time
from pathlib import Path
from lightning_lora.study.bank.bank import ArmBank, ArmRun
from lightning_lora import LoRAConfig
from lightning_lora.callbacks import GracefulStop
from tests.study.matched.learner import Learner, Rows
from tests.support import toys

class Slow(Learner):
    def training_step(self, batch, batch_idx):
        Path("begun").touch()
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

def stop(signum, frame):
    raise SystemExit(128 + signum)

signal.signal(signal.SIGTERM, stop)
runs = {
    name: ArmRun(
        toys.trainer(Path(name), max_epochs=-1, enable_checkpointing=True, callbacks=[GracefulStop()]),
        Slow(1e-3, LoRAConfig(rank=2)), Rows(), seed=1,
    )
    for name in ("one", "two")
}
ArmBank().fit(runs)
"""


@pytest.mark.slow
def test_a_signal_lets_each_arm_save_its_state(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)
    process = warm.Process(str(tmp_path / "stopped.py"), cwd=tmp_path)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert len(list(tmp_path.rglob("stopped.ckpt"))) == 2
