"""What a plan runs here ends in time, and at once when it is told to."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_lora.errors import ConfigError
from lightning_lora.planning import base_bits
from lightning_lora.planning.base_bits import measure_base_bits
from lightning_lora.planning.devices import find_devices
from lightning_lora.planning.timing.rounds import BATCH_TOKENS, Rounds
from tests.support import toys, warm

pytestmark = toys.expected_warnings


class Machine:
    """A clock that goes on by some seconds for each token that runs."""

    def __init__(self, of_token: float) -> None:
        self.of_token, self.now = of_token, 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, rounds: Rounds, lengths: numpy.ndarray) -> list[list[int]]:
        batches = []
        for batch in rounds:
            self.now += self.of_token * int(lengths[batch].sum())
            batches.append(batch)
        return batches


LENGTHS = numpy.random.default_rng(0).integers(50, 400, 1000)
CHOSEN = numpy.random.default_rng(1).permutation(1000)


def rounds(seconds: float, clock: Callable[[], float]) -> Rounds:
    return Rounds(range(1000), CHOSEN, LENGTHS[CHOSEN], list, seconds, clock)


@pytest.mark.parametrize(("of_token", "least"), [(1e-6, 1000), (1e-3, 150), (0.02, 8), (10.0, 2)])
def test_the_rows_that_fit_into_the_time_run_and_are_the_first_of_a_random_order(of_token: float, least: int) -> None:
    machine = Machine(of_token)
    given = rounds(60.0, machine)
    batches = machine.run(given, LENGTHS)
    ran = sorted(row for batch in batches for row in batch)
    assert ran == sorted(CHOSEN[: given.done])
    assert least <= given.done <= len(given)
    assert machine.now <= 60 or given.done == 2
    assert all(len(batch) * LENGTHS[batch].max() <= BATCH_TOKENS for batch in batches)


def test_a_machine_that_slows_down_ends_the_rounds() -> None:
    machine = Machine(1e-3)
    given, ran = rounds(60.0, machine), 0
    for batch in given:
        machine.now += machine.of_token * int(LENGTHS[batch].sum())
        machine.of_token *= 1.2
        ran += len(batch)
    assert given.done == ran < 1000


class Classes(LightningModule):
    """A classifier whose every batch takes some seconds; `steps` tells of each."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.scores, self.seconds = torch.nn.Linear(4, 3), seconds

    def loss(self, batch: list[Tensor]) -> Tensor:
        print("step", flush=True)
        time.sleep(self.seconds)
        return torch.nn.functional.cross_entropy(self.scores(batch[0]), batch[1], reduction="none")

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return {"loss": self.loss(batch)}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def labelled(rows: int = 300) -> LightningDataModule:
    x = torch.arange(4.0 * rows).view(rows, 4)
    return LightningDataModule.from_datasets(TensorDataset(x, torch.arange(rows) % 3), batch_size=1, num_workers=0)


def test_a_slow_base_is_measured_on_fewer_rows_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = measure_base_bits(Classes(0.02), labelled(), seconds=0.5)
    assert 2 <= found.rows <= 25
    assert found.low < found.bits < found.high
    assert capsys.readouterr().err == "running the base on up to 300 rows, for at most 0 seconds\n"
    with pytest.raises(ConfigError, match="seconds must be more than 0"):
        measure_base_bits(Classes(), labelled(), seconds=0)


def test_a_base_that_is_larger_than_the_memory_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    here = find_devices(accelerator="cpu")
    small = replace(here, device=replace(here.device, memory=10))
    monkeypatch.setattr(base_bits, "find_devices", lambda: small)
    with pytest.raises(ConfigError, match=r"its weights \(0\.0 GiB\) are more than the memory of .*leave out measure"):
        measure_base_bits(Classes(), labelled())


# Runs for a minute unless it is told to end.
ENDLESS = """
import sys
from contextlib import nullcontext
from lightning_lora.cli.quiet import quiet_libraries
from lightning_lora.planning.base_bits import measure_base_bits
from lightning_lora.planning.stop_signals import ending_at_once
from lightning_lora.planning.timed_steps import time_steps
from tests.planning.test_bounds import Classes, labelled

quiet_libraries()
what, doing = sys.argv[1:]
with ending_at_once(doing) if doing else nullcontext():
    if what == "measure":
        measure_base_bits(Classes(0.2), labelled())
    else:
        time_steps(Classes(0.2), labelled(), batches=300, max_seconds=60)
"""


@pytest.mark.parametrize(
    ("what", "doing", "number", "code", "words"),
    [
        ("measure", "plan", signal.SIGTERM, 143, "plan was ended by SIGTERM; nothing is written.\n"),
        ("time", "plan", signal.SIGINT, 130, "plan was ended by Ctrl-C; nothing is written.\n"),
        ("measure", "", signal.SIGTERM, 143, ""),
        ("time", "", signal.SIGTERM, 143, ""),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="other signals")
def test_a_signal_ends_it_at_once_and_with_one_line(
    what: str, doing: str, number: int, code: int, words: str, tmp_path: Path
) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors"
    process = warm.Process("-c", ENDLESS, what, doing, stdout=out, stderr=errors)
    deadline = time.monotonic() + warm.LIMIT
    while not (out.exists() and out.read_text().count("step") >= 3):
        assert process.poll() is None, errors.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    begun = time.monotonic()
    assert process.wait() == code
    assert time.monotonic() - begun < 10
    said = errors.read_text().replace("running the base on up to 300 rows, for at most 60 seconds\n", "").lstrip("\n")
    assert said == words
