"""Counts of labels of other data modules and loaders, by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import datasets
import numpy
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    random_split,
)

from lightning_lora.errors import DataError
from lightning_lora.planning import dataset_targets
from lightning_lora.planning.count_data import count_data
from lightning_lora.planning.data_counts import DataCounts

LABELS = torch.tensor([0, 1, 1, 2, 2, 2, 2, 0])
ENTROPY = -sum(share * math.log2(share) for share in (0.25, 0.25, 0.5))
INPUTS = torch.arange(32.0).view(8, 4)


class Pairs(Dataset[Any]):
    """Items that are tuples, and a list of all targets."""

    def __init__(self, targets: Tensor = LABELS, lists_inputs: bool = False) -> None:
        self.targets = targets.tolist()
        self.reads = 0
        if lists_inputs:
            self.data = INPUTS.numpy()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        self.reads += 1
        return INPUTS[number], self.targets[number]


class Mapped(Dataset[Any]):
    """Items that are mappings."""

    def __init__(self, key: str, values: Any = LABELS) -> None:
        self.key = key
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"x": torch.tensor(number), self.key: self.values[number]}


def as_mappings(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {"pixels": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}


LOADERS = {
    "tensors": lambda: DataLoader(TensorDataset(INPUTS, LABELS), 3, shuffle=True),
    "tuples": lambda: DataLoader(Pairs(), 3),
    "listed targets": lambda: DataLoader(Pairs(lists_inputs=True), 3),
    "a split": lambda: DataLoader(random_split(Pairs(torch.cat([LABELS, LABELS])[:8]), [8, 0])[0], 3),
    "two parts": lambda: DataLoader(ConcatDataset([Subset(Pairs(), range(5)), Subset(Pairs(), range(5, 8))]), 3),
    "two loaders": lambda: [
        DataLoader(Subset(TensorDataset(INPUTS, LABELS), [0, 1, 3, 4])),
        DataLoader(Subset(TensorDataset(INPUTS, LABELS), [7, 2, 5, 6])),
    ],
    "mappings": lambda: DataLoader(Mapped("label"), 3),
    "labels": lambda: DataLoader(Mapped("labels", LABELS.tolist()), 3),
    "y": lambda: DataLoader(Mapped("y", LABELS.numpy()), 3),
    "a hub dataset": lambda: DataLoader(
        datasets.Dataset.from_dict({"x": INPUTS.tolist(), "label": LABELS.tolist()}).with_format("torch"),  # type: ignore[arg-type]
        3,
    ),
    "made by a collator": lambda: DataLoader(TensorDataset(INPUTS, LABELS), 3, collate_fn=as_mappings),
    "a sampler of batches": lambda: DataLoader(Pairs(), batch_sampler=[[0, 1, 2], [3, 4], [5, 6, 7]]),  # type: ignore[arg-type]
    "no batches": lambda: DataLoader(Pairs(), batch_size=None),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_labels_of_every_kind_of_data_are_counted(kind: str) -> None:
    counts = count_data(LOADERS[kind]())
    found = counts.unit, counts.rows, counts.supervised_tokens, counts.unique_supervised_tokens, counts.duplicate_rows
    assert found == ("labels", 8, 8, 8, 0)
    assert counts.bits == pytest.approx(8 * ENTROPY)
    assert counts.num_classes == 3
    assert counts.longest_row is counts.mean_row is None


def test_repeated_rows_count_once_and_rows_with_another_label_are_others() -> None:
    numbers = torch.tensor([0, 1, 0, 0, 1])
    counts = count_data(DataLoader(TensorDataset(INPUTS[numbers], torch.tensor([5, 6, 5, 7, 6]))))
    assert (counts.supervised_tokens, counts.unique_supervised_tokens, counts.duplicate_rows) == (5, 3, 2)
    assert counts.bits == pytest.approx(3 * math.log2(3))
    again = count_data(DataLoader(ConcatDataset([Pairs(), Pairs()])))
    assert (again.unique_supervised_tokens, again.duplicate_rows) == (8, 8)


def test_every_pixel_with_a_label_counts() -> None:
    masks = torch.tensor([[[0, 1], [1, -100]], [[-100, -100], [-100, -100]], [[0, 0], [1, 1]]])
    counts = count_data(DataLoader(TensorDataset(INPUTS[:3], masks.to(torch.int16))))
    assert (counts.rows, counts.supervised_tokens, counts.unsupervised_rows, counts.num_classes) == (3, 7, 1, 2)
    assert counts.bits == pytest.approx(7 * -(3 / 7 * math.log2(3 / 7) + 4 / 7 * math.log2(4 / 7)))


def test_one_class_holds_no_information() -> None:
    assert count_data(DataLoader(TensorDataset(INPUTS, torch.ones(8, dtype=torch.int64)))).bits == 0


def test_labels_that_are_the_rows_own_tokens_are_tokens() -> None:
    rows = {"input_ids": [[1, 2, 3, 4], [5, 6, 7], [5, 6, 7]], "labels": [[-100, -100, 3, 4], [5, 6, 7], [5, 6, 7]]}
    counts = count_data(DataLoader(datasets.Dataset.from_dict(rows)))  # type: ignore[arg-type]
    # The first token of a row is predicted from nothing.
    found = counts.unit, counts.supervised_tokens, counts.unique_supervised_tokens, counts.bits
    assert found == ("tokens", 6, 4, 4.0)
    assert (counts.longest_row, counts.mean_row, counts.duplicate_rows) == (4, pytest.approx(10 / 3), 1)
    tags = {"input_ids": [[1, 2, 3]], "labels": [[0, 1, -100]]}
    assert count_data(DataLoader(datasets.Dataset.from_dict(tags))).unit == "labels"  # type: ignore[arg-type]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a stream must not be read")


@pytest.mark.parametrize(
    ("loader", "rows"),
    [
        (lambda: DataLoader(TensorDataset(INPUTS, INPUTS[:, 0])), 8),
        (lambda: DataLoader(TensorDataset(INPUTS)), 8),
        (lambda: DataLoader(Mapped("mask")), 8),
        (lambda: DataLoader(Mapped("label", ["a", "b"])), 2),
        (lambda: DataLoader(Stream()), None),
        (lambda: iter([]), None),
    ],
    ids=["regression", "no target", "unknown name", "texts", "stream", "iterator"],
)
def test_nothing_is_made_up_where_nothing_is_known(loader: Any, rows: int | None) -> None:
    assert count_data(loader()) == DataCounts("unknown", rows, None, None, None, None, 0, 0)


def test_only_the_rows_of_the_sampler_count() -> None:
    counts = count_data(DataLoader(Pairs(), sampler=SubsetRandomSampler([3, 4, 5])))
    assert (counts.rows, counts.bits) == (3, 0)
    drawn = count_data(DataLoader(Pairs(), sampler=RandomSampler(range(8), replacement=True, num_samples=50)))
    assert drawn.rows == 50
    assert drawn.unique_supervised_tokens == 50 - (drawn.duplicate_rows or 0)
    assert 2 < (drawn.unique_supervised_tokens or 0) <= 8


class Own(LightningDataModule):
    """Draws in ``setup`` and in its loader from generators of its own and from the global one."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
        self.sampler = RandomSampler(range(6), generator=torch.Generator().manual_seed(4), num_samples=4)

    def setup(self, stage: str) -> None:
        self.train, _ = random_split(Pairs(), [6, 2], generator=self.generator)
        numpy.random.rand()
        torch.rand(1)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_sampler=BatchSampler(self.sampler, 2, drop_last=False))

    def order(self) -> list[float]:
        self.setup("fit")
        return [float(x[0]) for batch, _ in self.train_dataloader() for x in batch]


def test_counting_draws_nothing_that_training_would_draw() -> None:
    datamodule, other = Own(), Own()
    states = torch.get_rng_state(), repr(numpy.random.get_state())
    counts = count_data(datamodule)
    assert counts.rows == 4
    assert not hasattr(datamodule, "train")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert repr(numpy.random.get_state()) == states[1]
    assert datamodule.order() == other.order()


def test_a_loader_keeps_its_order() -> None:
    loaders = [DataLoader(Pairs(), 2, shuffle=True, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    count_data(loaders[0])
    orders = [[y.tolist() for _, y in loader] for loader in loaders]
    assert orders[0] == orders[1]


def test_a_sampler_that_draws_from_the_global_generator_leaves_it_as_it_is() -> None:
    state = torch.get_rng_state()
    count_data(DataLoader(Pairs(), sampler=SubsetRandomSampler(range(8))))
    assert torch.equal(torch.get_rng_state(), state)


def test_slow_items_are_sampled_and_the_counts_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_targets, "_affordable", lambda *_: 100)
    counts = count_data(DataLoader(Mapped("label", [0, 1] * 500)))
    assert (counts.rows, counts.counted_rows, counts.duplicate_rows) == (1000, 100, None)
    assert counts.supervised_tokens == counts.unique_supervised_tokens == 1000
    assert counts.bits == pytest.approx(1000, rel=0.1)
    assert counts.remarks() == ["100 of 1,000 rows were read; the counts are scaled up from these."]


def test_items_are_not_read_where_they_are_slow_and_the_targets_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_targets, "_affordable", lambda *_: 4)
    dataset = Pairs()
    counts = count_data(DataLoader(dataset))
    assert (counts.supervised_tokens, counts.duplicate_rows, counts.counted_rows) == (8, None, None)
    assert counts.bits == pytest.approx(8 * ENTROPY)
    # Only to see that the items have the listed targets.
    assert dataset.reads <= 6


def test_targets_that_a_transform_changes_are_read_from_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(Pairs):
        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            return INPUTS[number], self.targets[number] // 2

    assert count_data(DataLoader(Halved(lists_inputs=True))).num_classes == 2


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (torch.zeros(0, dtype=torch.int64), "the training loader has no rows"),
        (torch.full((5,), -100), "no row has a target: all labels of the 5 rows are -100"),
    ],
    ids=["empty", "masked"],
)
def test_nothing_to_learn_is_one_clear_error(labels: Tensor, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        count_data(DataLoader(TensorDataset(INPUTS[: len(labels)], labels)))
