"""Loaders of every kind continue after the batches that were trained on, or a warning says why they cannot."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from tests.support import resuming, toys
from tests.support.resuming import NUM_BATCHES, DiceyLoRA, check_exact, run, shuffled, unlike

pytestmark = [*toys.expected_warnings, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")]


@pytest.mark.parametrize(
    ("persistent", "places"),
    [
        (False, ["batch-0-3", "batch-1-3", "epoch-0"]),
        pytest.param(False, ["batch-0-4", "batch-1-7", "validation-1-3", "epoch-1"], marks=pytest.mark.slow),
        pytest.param(True, ["batch-0-3", "batch-1-4", "epoch-0", "batch-0-7"], marks=pytest.mark.slow),
    ],
)
def test_with_workers(persistent: bool, places: list[str], tmp_path: Path) -> None:
    loader = lambda: shuffled(num_workers=2, persistent_workers=persistent)  # noqa: E731
    check_exact(DiceyLoRA, tmp_path, places, loader=loader, accumulate_grad_batches=3, val_check_interval=3)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loader_with_a_generator_of_its_own(num_workers: int, tmp_path: Path) -> None:
    options = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    loader = lambda: shuffled(generator=torch.Generator().manual_seed(3), **options)  # noqa: E731
    check_exact(DiceyLoRA, tmp_path, ["batch-0-3", "batch-1-3", "epoch-0"], loader=loader)


@pytest.mark.slow
def test_a_generator_used_before_the_first_epoch_is_said_to_be_unknown(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(3)
        torch.rand(1, generator=generator)
        return shuffled(generator=generator, num_workers=2)

    run(DiceyLoRA, tmp_path, loader=loader)
    with pytest.warns(UserWarning, match="the generator of a loader with workers had been drawn from"):
        run(DiceyLoRA, tmp_path, tmp_path / "batch-0-3.ckpt", loader=loader)


class Counting(Dataset[list[Tensor]]):
    """Rows that note when they are read."""

    def __init__(self) -> None:
        self.rows = toys.rows(2 * NUM_BATCHES)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Tensor]:
        self.read.append(index)
        return [tensor + 0.01 * random.random() for tensor in self.rows[index]]


def test_no_row_is_read_again_and_random_rows_are_the_same(tmp_path: Path) -> None:
    data: list[Counting] = []

    def loader() -> DataLoader[Any]:
        data.append(Counting())
        return DataLoader(data[-1], batch_size=2, shuffle=True)

    check_exact(DiceyLoRA, tmp_path, ["batch-1-4"], loader=loader)
    whole, resumed = (each.read for each in data)
    assert resumed == whole[2 * (NUM_BATCHES + 4) :]


def test_a_batch_sampler_of_ones_own_goes_on(tmp_path: Path) -> None:
    class Own(BatchSampler):
        def __iter__(self) -> Any:
            return iter(list(super().__iter__())[::-1])

    rows = toys.rows(2 * NUM_BATCHES)
    loader = lambda: DataLoader(rows, batch_sampler=Own(RandomSampler(rows), 2, drop_last=False))  # noqa: E731
    check_exact(DiceyLoRA, tmp_path, ["batch-0-4", "batch-1-2", "epoch-0"], loader=loader)


def test_two_loaders_go_on_together(tmp_path: Path) -> None:
    class Both(DiceyLoRA):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

    loader = lambda: {"a": shuffled(), "b": shuffled(num_batches=12)}  # noqa: E731
    whole = run(Both, tmp_path, loader=loader)
    assert not unlike(whole, run(Both, tmp_path, tmp_path / "batch-1-4.ckpt", loader=loader))
    with pytest.warns(UserWarning, match="a DataLoader of 7 batches has begun again within the epoch"):
        run(Both, tmp_path, tmp_path / "batch-1-9.ckpt", loader=loader)


class Stream(IterableDataset[list[Tensor]]):
    def __iter__(self) -> Any:
        return iter(toys.rows(2 * NUM_BATCHES))


def test_what_cannot_be_exact_is_said_once(tmp_path: Path) -> None:
    loader = lambda: DataLoader(Stream(), batch_size=2)  # noqa: E731
    run(DiceyLoRA, tmp_path, loader=loader, val_check_interval=3)
    with pytest.warns(UserWarning, match="not exactly as it would have: the rows of an iterable dataset") as caught:
        run(DiceyLoRA, tmp_path, tmp_path / "batch-1-4.ckpt", loader=loader, val_check_interval=3)
    assert sum("not exactly" in str(warning.message) for warning in caught) == 1


def test_another_seed_of_the_order_is_told(tmp_path: Path) -> None:
    """Lightning's own sampler of several ranks draws from the seed of ``seed_everything``, not from a random state."""

    def ordered(seed: int) -> DataLoader[Any]:
        rows = toys.rows(2 * NUM_BATCHES)
        return DataLoader(rows, 2, sampler=DistributedSampler(rows, num_replicas=1, rank=0, seed=seed))

    check_exact(DiceyLoRA, tmp_path, ["batch-1-4"], loader=lambda: ordered(3))
    with pytest.warns(UserWarning, match=r"the order of its rows came from the seeds \[3\], and now from \[4\]"):
        run(DiceyLoRA, tmp_path, tmp_path / "batch-1-4.ckpt", loader=lambda: ordered(4))


def test_the_end_of_an_epoch_is_exact_with_an_iterable_dataset(tmp_path: Path) -> None:
    check_exact(DiceyLoRA, tmp_path, ["epoch-0"], loader=lambda: DataLoader(Stream(), batch_size=2))


@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated")  # torchdata asks torch for it
@pytest.mark.parametrize(
    ("make", "num_workers"),
    [(DiceyLoRA, 0), (resuming.Smooth, 0), pytest.param(resuming.Smooth, 2, marks=pytest.mark.slow)],
)
def test_a_loader_that_keeps_its_position_is_asked_for_it(
    make: Callable[[], LightningModule], num_workers: int, tmp_path: Path
) -> None:
    stateful: Any = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    rows = toys.rows(2 * NUM_BATCHES)
    loader = lambda: stateful(rows, batch_size=2, shuffle=True, num_workers=num_workers)  # noqa: E731
    places = ["batch-0-4", "epoch-0"] if num_workers else ["batch-0-4", "batch-1-3", "epoch-0"]
    check_exact(make, tmp_path, places, loader=loader, val_check_interval=3)
