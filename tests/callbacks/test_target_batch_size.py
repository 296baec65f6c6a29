"""The rows of a step stay what was asked for, whatever fits the device, and the search for that leaves no trace."""

from __future__ import annotations

import logging
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora import LoRAConfig, LoRAMixin
from lightning_lora.batch.division import divide
from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.batch.trial_step import longest_batch, row_size, untouched
from lightning_lora.callbacks import AdaptiveAccumulation, MemoryAdvice, TargetBatchSize
from lightning_lora.checkpoints.random_state import random_state
from lightning_lora.effective_batch import EffectiveBatch
from lightning_lora.errors import ConfigError
from tests.support import toys

pytestmark = toys.expected_warnings

NUM_ROWS = 52
"""Without the last rows, batches of 8 make 3 steps of 16, and batches of 4 make 4."""


class Data(LightningDataModule):
    def __init__(self, batch_size: Any = 8, **options: Any) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.options: dict[str, Any] = {"shuffle": True} | options

    def train_dataloader(self) -> Any:
        rows: Any = toys.token_rows(NUM_ROWS)
        return DataLoader(rows, self.batch_size, **self.options)


class Cramped(LoRAMixin, TokenWeightedLoss):
    """A module with everything that a trial could leave behind, which has room for so many rows and no more."""

    lora = LoRAConfig(rank=2, targets=["up"], dropout=0.2)
    room = NUM_ROWS
    automatic = True

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.table, self.up, self.down = nn.Embedding(300, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.sizes: list[int] = []
        self.drawn: list[float] = []
        self.steps: list[int] = []
        self.num_calls = 0
        self.automatic_optimization = self.automatic

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.num_calls += 1
        self.sizes.append(len(batch["labels"]))
        self.drawn += [random.random(), float(torch.rand(()))]
        self.seen += batch["input_ids"].sum()
        mask = batch["labels"] != -100
        errors = self.down(torch.tanh(self.up(self.table(batch["input_ids"])))).squeeze(-1) - batch["input_ids"] / 150
        loss = self.token_loss((errors.square() * mask).sum(), mask.sum())
        if len(mask) > self.room:
            raise torch.OutOfMemoryError(f"no room for {len(mask)} rows")
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.steps.append(sum(self.sizes[sum(map(self.per_step, self.steps)) :]))

    def per_step(self, rows: int) -> int:
        return -(-rows // self.sizes[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.lora_parameter_groups(1e-2))
        self.planned = self.trainer.estimated_stepping_batches
        self.scheduler = LambdaLR(optimizer, lambda step: 1 - step / self.planned)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}


def fit(folder: Path, target: TargetBatchSize | None, module: Cramped, data: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    random.seed(0)
    own: list[Callback] = [target] if target else []
    trainer = toys.trainer(folder, **({"callbacks": own} | options))
    trainer.fit(module, **source(Data() if data is None else data))
    return trainer


def source(data: Any) -> dict[str, Any]:
    return {"datamodule" if isinstance(data, Data) else "train_dataloaders": data}


@pytest.mark.parametrize(
    ("rows", "ranks", "at_once", "expected"),
    [
        (32, 1, 8, "effective batch 32 = 8 rows x 4 accumulated x 1 device"),
        (32, 2, 8, "effective batch 32 = 8 rows x 2 accumulated x 2 devices"),
        (32, 8, 8, "effective batch 32 = 4 rows x 1 accumulated x 8 devices"),
        (3, 1, 1, "effective batch 3 = 1 rows x 3 accumulated x 1 device"),
    ],
)
def test_a_step_is_divided_among_devices(rows: int, ranks: int, at_once: int, expected: str) -> None:
    assert str(divide(rows, ranks, at_once)) == expected
    assert divide(rows, ranks, at_once).rows == rows


@pytest.mark.parametrize(
    ("rows", "ranks", "at_once", "message"),
    [
        (33, 2, 8, "cannot be shared by 2 devices: the nearest that can are 32 and 34"),
        (3, 4, 1, "less than a row for each of 4 devices: give 4, or fewer devices"),
        (36, 1, 8, r"no multiple of 8 rows x 1 device: .* are 32 and 40; or keep it with a batch_size of 9 or 6"),
        (36, 2, 16, r"no multiple of 16 rows x 2 devices: .* are 32 and 64; or keep it with a batch_size of 18 or 9"),
    ],
)
def test_a_step_that_cannot_be_divided_names_the_nearest_that_can(
    rows: int, ranks: int, at_once: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        divide(rows, ranks, at_once)


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
    """The allocator's own error: a step of 16 rows takes more than the 256 MiB that there are."""
    printed = toys.run_python(CONFINED, tmp_path).stdout
    assert "can't allocate memory" in printed
    batch = re.search(r"2 steps, 32 rows, effective batch 16 = (\d) rows x \d accumulated x 1 device", printed)
    assert batch
    assert int(batch[1]) in (2, 4, 8)


def test_a_step_that_cannot_fit_says_so_and_what_to_lower(tmp_path: Path) -> None:
    module = Cramped()
    module.room = 0
    with pytest.raises(MemoryError, match=r"(?s)not even one row fits.*Out of memory in optimizer step 1. Lower"):
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


def test_a_trial_takes_the_longest_rows_and_leaves_loader_and_numbers_alone(tmp_path: Path) -> None:
    sizes = [3, 9, 1, 7, 9, 2]
    rows: Any = [torch.ones(size) for size in sizes]
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(rows, 2, shuffle=True, generator=generator, collate_fn=list)

    class Look(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = random_state(torch.device("cpu"), [generator])
            batch = longest_batch(trainer, loader, 3)
            assert [len(row) for row in batch] == [9, 9, 7]
            after = random_state(torch.device("cpu"), [generator])
            assert torch.equal(before["torch"], after["torch"])
            assert torch.equal(before["own"][0], after["own"][0])
            self.has_looked = True

    fit(tmp_path, None, Cramped(), callbacks=[look := Look()])
    assert look.has_looked


@pytest.mark.parametrize(
    ("row", "size"),
    [
        (torch.ones(2, 3), 6),
        ({"ids": [1, 2], "text": "abc"}, 5),
        ((torch.ones(4), 1), 5),
        (torch.ones(3).numpy(), 3),
    ],
)
def test_the_size_of_a_row_is_what_it_holds(row: Any, size: int) -> None:
    assert row_size(row) == size


def test_nothing_that_happens_in_a_trial_stays(tmp_path: Path) -> None:
    class Mess(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            module: Any = pl_module
            before = toys.snapshot(module)
            with untouched(trainer, module):
                module.seen = module.seen + 1
                module.up.lora_A.data += 1
                module.sizes += [3]
                module.num_calls, module.novel = 9, 9
                module.up.extra = 1
                torch.rand(1)
                module.training_step(next(iter(Data().train_dataloader())), 0).backward()
                trainer.optimizers[0].step()
            assert toys.same(before, toys.snapshot(module))
            assert all(p.grad is None for p in module.parameters())
            assert not trainer.optimizers[0].state
            assert (module.sizes, module.num_calls, module.drawn) == ([], 0, [])
            assert not hasattr(module, "novel")
            assert not hasattr(module.up, "extra")
            assert isinstance(module._window_tokens, int)
            self.is_done = True

    fit(tmp_path, None, Cramped(), callbacks=[mess := Mess()])
    assert mess.is_done


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
    """Its loader is made of what its setup makes."""

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
    assert "whether 8 rows fit is not tried: the loader was not made by a module with a batch_size" in caplog.text
    assert "whether 8 rows fit is not tried: rows cannot be chosen from a DataLoader of this kind" in caplog.text


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("twice", {"accumulate_grad_batches": 2}, "which is 2 already: give one of the two"),
    ("scheduler", {"more": [GradientAccumulationScheduler({0: 1})]}, "and target_batch_size too: keep one of the two"),
    ("schedule", {"more": [AdaptiveAccumulation({3: 2})]}, "a schedule sets accumulation, and target_batch_size"),
    ("manual", {"module": ByHand}, "with manual optimization the module decides when to step"),
    ("indivisible", {"rows": 36}, "target_batch_size=36 is no multiple of 8 rows x 1 device"),
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
    with pytest.raises(ConfigError, match="whole number of rows, 1 or more"):
        TargetBatchSize(rows)
