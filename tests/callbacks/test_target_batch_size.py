"""The rows of a step stay what was asked for, whatever fits the device, and the search for that leaves no trace."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora.callbacks import AdaptiveAccumulation, MemoryAdvice, TargetBatchSize
from lightning_lora.effective_batch import EffectiveBatch
from lightning_lora.errors import ConfigError
from tests.support import toys
from tests.support.cramped import NUM_ROWS, Cramped, Data, fit, source

pytestmark = toys.expected_warnings


@pytest.mark.slow
@pytest.mark.parametrize(("room", "micro_batch"), [(NUM_ROWS, 8), (7, 4), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"drop_last": True}])
def test_a_search_ends_in_the_run_that_was_given_what_it_finds(
    room: int, micro_batch: int, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, given = Cramped(), Cramped()
    found.room = room
    with caplog.at_level(logging.INFO):
        target = TargetBatchSize(16)
        searched = fit(tmp_path, target, found, Data(**options))
    assert target.batch == EffectiveBatch(micro_batch, 16 // micro_batch, 1)
    assert str(target.batch) in caplog.text
    by_hand = fit(tmp_path, None, given, Data(micro_batch, **options), accumulate_grad_batches=16 // micro_batch)
    assert toys.same(toys.snapshot(found), toys.snapshot(given))
    assert (found.sizes, found.drawn, found.steps) == (given.sizes, given.drawn, given.steps)
    assert found.steps[:3] == [16, 16, 16]
    assert found.planned == given.planned == searched.global_step == by_hand.global_step
    assert toys.same(flat(searched), flat(by_hand))


def flat(trainer: Trainer) -> dict[str, Tensor]:
    (optimizer,) = trainer.optimizers
    states = enumerate(optimizer.state_dict()["state"].values())
    return {f"{place}.{name}": value for place, state in states for name, value in state.items()}


CONFINED = """
import resource, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader
from lightning_lora.callbacks import TargetBatchSize
from tests.support import toys

WIDTH = 2**21  # 8 MiB a row, and several of them for a step

class Wide(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.num_rows = 0

    def training_step(self, batch, batch_idx):
        self.num_rows += len(batch)
        return torch.tanh(torch.tanh(batch.expand(-1, WIDTH) * self.weight)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)

class Data(LightningDataModule):
    batch_size = 16

    def train_dataloader(self):
        return DataLoader(torch.ones(32, 1), self.batch_size)

def fit(fit_memory):
    target = TargetBatchSize(16, fit_memory)
    trainer = toys.trainer(Path(sys.argv[1]), callbacks=[target])
    trainer.fit(module := Wide(), datamodule=Data())
    print(f"{trainer.global_step} steps, {module.num_rows} rows, {target.batch}")

taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 256 * 2**20,) * 2)
try:
    fit(False)
except RuntimeError as error:
    print(error)
fit(True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's memory is Linux's")
def test_a_process_out_of_memory_finds_what_fits(tmp_path: Path) -> None:
    """The error is the allocator's own: 16 rows need more than the 256 MiB of the process, by their trace too."""
    ended = toys.run_python(CONFINED, tmp_path)
    printed = ended.stdout
    assert re.search(r"a batch_size above [48] is not tried: a traced step", ended.stderr)
    assert "a step of the 16 longest rows" not in ended.stderr
    assert "can't allocate memory" in printed
    batch = re.search(r"2 steps, 32 rows, effective batch 16 = (\d) rows x \d accumulated x 1 device", printed)
    assert batch
    assert int(batch[1]) in (2, 4, 8)


def test_a_step_that_cannot_fit_says_so_and_what_to_lower(tmp_path: Path) -> None:
    module = Cramped()
    module.room = 0
    with pytest.raises(
        MemoryError,
        match=r"(?s)not even with one row.*Out of memory in optimizer step 1. Lower",
    ):
        fit(tmp_path, None, module, callbacks=[TargetBatchSize(16), MemoryAdvice()])


def test_other_errors_of_a_trial_are_not_taken_for_lack_of_memory(tmp_path: Path) -> None:
    class Wrong(Cramped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(tmp_path, TargetBatchSize(16), Wrong())


def test_without_the_search_nothing_is_tried(tmp_path: Path) -> None:
    module = Cramped()
    module.room = 4
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, TargetBatchSize(16, fit_memory=False), module)
    assert module.num_calls == 1


def test_a_second_fit_of_the_same_trainer_is_as_the_first(tmp_path: Path) -> None:
    trainer = fit(tmp_path, TargetBatchSize(16), Cramped())
    assert trainer.accumulate_grad_batches == 1
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module := Cramped(), datamodule=Data())
    assert module.steps == [16, 16, 16, 4]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from toys.token_rows(NUM_ROWS)


class OfStream(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), self.batch_size)


class Deaf(Data):
    def train_dataloader(self) -> Any:
        rows: Any = toys.token_rows(NUM_ROWS)
        return DataLoader(rows, 2)


class ByHand(Cramped):
    automatic = False


class Late(Cramped):
    """Makes its loader from rows that its setup makes."""

    def setup(self, stage: str) -> None:
        self.rows: Any = toys.token_rows(NUM_ROWS)

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows, 8)


def given(batch_size: int = 8) -> Any:
    rows: Any = toys.token_rows(NUM_ROWS)
    return DataLoader(rows, batch_size)


def test_a_loader_given_to_fit_keeps_its_batches_and_says_that_it_was_not_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        fit(tmp_path, TargetBatchSize(16), module := Cramped(), given())
        fit(tmp_path, TargetBatchSize(16), Cramped(), OfStream(), max_steps=3, max_epochs=-1)
    assert module.steps[:3] == [16, 16, 16]
    assert "8 rows are not tried: the loader was not made by a module with a batch_size" in caplog.text
    assert "8 rows are not tried: rows cannot be chosen from a DataLoader of this kind" in caplog.text


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("twice", {"accumulate_grad_batches": 2}, "which is 2 already: give one of the two"),
    (
        "scheduler",
        {"more": [GradientAccumulationScheduler({0: 1})]},
        "and target_batch_size both set accum",
    ),
    (
        "schedule",
        {"more": [AdaptiveAccumulation({3: 2})]},
        "Accumulation and target_batch_size both set",
    ),
    ("manual", {"module": ByHand}, "with manual optimization the module decides when to step"),
    ("indivisible", {"rows": 36}, "target_batch_size=36 is not a multiple of 8 rows x 1 device"),
    ("given", {"rows": 4, "data": given}, r"more than the 4 .*: make the loader with batch_size=4"),
    ("deaf", {"data": Deaf}, "batch_size is 8, but the training loader makes batches of 2 rows"),
    ("unknown", {"module": Late, "data": None}, "give Late an attribute batch_size that its train_dataloader"),
]


@pytest.mark.parametrize(
    ("case", "message"), [(case, text) for _, case, text in REFUSED], ids=[n for n, _, _ in REFUSED]
)
def test_what_contradicts_the_target_is_refused(case: dict[str, Any], message: str, tmp_path: Path) -> None:
    case = dict(case)
    data = case.pop("data", Data)
    module = case.pop("module", Cramped)()
    callbacks = [TargetBatchSize(case.pop("rows", 16)), *case.pop("more", [])]
    trainer = toys.trainer(tmp_path, callbacks=callbacks, **case)
    made = data() if data else None
    with pytest.raises(ConfigError, match=message):
        trainer.fit(module, **source(made))


@pytest.mark.parametrize("rows", [0, -8, True, 2.5, "32"])
def test_rows_that_are_no_number_are_refused(rows: Any) -> None:
    with pytest.raises(ConfigError, match="whole number of 1 or more"):
        TargetBatchSize(rows)
