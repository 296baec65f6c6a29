"""Packing loses and repeats no example, and marks where each one begins."""

from __future__ import annotations

from itertools import chain
from typing import Any

import jsonargparse
import numpy
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from lightning_lora.data.batches.collate import CollatePacked
from lightning_lora.data.batches.packing import PackedRows, PackSampler
from lightning_lora.errors import ConfigError
from tests.data.conftest import QUIET, Write, examples
from tests.data.test_training import Bigram

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '\\w+' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling"),
]

NUM_ROWS = 41
ROWS = [{"question": f"{n:03d}" + "x" * (n * 7 % 23), "answer": "0" * (1 + n % 5)} for n in range(NUM_ROWS)]
"""Every question begins with its number."""


@pytest.fixture
def path(write: Write) -> str:
    return write("a.jsonl", ROWS)


def ready(path: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> SFTDataModule:
    data = SFTDataModule(path, tokenizer=tokenizer, **{"max_length": 64, "packing": True} | options)
    data.setup("fit")
    return data


def packs(data: SFTDataModule, epoch: int = 0) -> list[tuple[int, ...]]:
    sampler: Any = data.train_dataloader().sampler
    sampler.set_epoch(epoch)
    return list(sampler)


def expected(data: SFTDataModule) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each example, from the rows as they were read."""
    rows: Any = data.rows["train"]
    return [
        (row["input_ids"], [i if s else -100 for i, s in zip(row["input_ids"], row["supervised"], strict=True)])
        for row in rows
    ]


@pytest.mark.parametrize("packing", [True, "length", "batch"])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_row_is_in_an_epoch_once(path: str, tokenizer: PreTrainedTokenizerFast, packing: Any, epoch: int) -> None:
    data = ready(path, tokenizer, packing=packing, batch_size=3)
    loader: Any = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    assert sorted(chain.from_iterable(map(examples, loader))) == sorted(expected(data))


@pytest.mark.parametrize("num_devices", [2, 3, 8])
def test_devices_get_equally_many_packs_and_no_row_twice(num_devices: int) -> None:
    lengths = numpy.random.default_rng(0).integers(1, 60, NUM_ROWS)
    packed = PackedRows(None, lengths, 64, seed=1)
    for epoch in range(3):
        samplers = [PackSampler(packed, 1, num_devices, rank) for rank in range(num_devices)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert {len(share) for share in shares} == {len(samplers[0])}
        assert sorted(chain(*chain(*shares))) == list(range(NUM_ROWS))
        alone = PackSampler(packed, 1, 1, 0)
        alone.set_epoch(epoch)
        together = [pack for turn in zip(*shares, strict=True) for pack in turn]
        assert together[: len(packed)] == list(alone)
        assert all(pack == () for pack in together[len(packed) :])


def test_the_order_depends_on_seed_and_epoch_alone(path: str, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    first = packs(ready(path, tokenizer, seed=3), epoch=1)
    torch.manual_seed(2)
    numpy.random.seed(5)
    assert packs(ready(path, tokenizer, seed=3, batch_size=2), epoch=1) == first
    orders = {str(packs(ready(path, tokenizer, seed=seed), epoch)) for seed in (0, 1, 2**70) for epoch in range(3)}
    assert len(orders) == 9


def test_rows_meet_other_rows_in_another_epoch(path: str, tokenizer: PreTrainedTokenizerFast) -> None:
    data = ready(path, tokenizer)
    first, second = ({frozenset(pack) for pack in packs(data, epoch)} for epoch in (0, 1))
    assert len(first) == len(second)
    assert len(first & second) < len(first) / 2


def test_positions_begin_again_with_each_example_and_padding_has_no_labels() -> None:
    def row(*ids: int) -> dict[str, Any]:
        return {"input_ids": list(ids), "supervised": [False] + [True] * (len(ids) - 1)}

    batch = CollatePacked(pad_id=9)([[row(1, 2, 3), row(4, 5)], [row(6, 7)], []])
    none = -100
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 9, 9, 9], [9] * 5]
    assert batch["labels"].tolist() == [[none, 2, 3, none, 5], [none, 7, none, none, none], [none] * 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert "attention_mask" not in batch
    assert CollatePacked(pad_id=9)([[]])["input_ids"].tolist() == [[9]]


@pytest.mark.parametrize("text", [False, True])
def test_no_example_begins_with_a_label(write: Write, tokenizer: PreTrainedTokenizerFast, text: bool) -> None:
    rows: list[Any] = [{"text": row["question"]} for row in ROWS] if text else ROWS
    for batch in ready(write("a.jsonl", rows), tokenizer).train_dataloader():
        assert (batch["labels"][batch["position_ids"] == 0] == -100).all()
        assert (batch["labels"] != -100).any()


def test_a_packed_batch_holds_the_examples_of_the_padded_one(path: str, tokenizer: PreTrainedTokenizerFast) -> None:
    padded, packed = (ready(path, tokenizer, packing=packing, batch_size=8) for packing in (False, "batch"))
    for rows, fewer in zip(padded.train_dataloader(), packed.train_dataloader(), strict=True):
        assert sorted(examples(fewer)) == sorted(examples(rows))
        assert len(fewer["input_ids"]) < len(rows["input_ids"]) or len(rows["input_ids"]) == 1
        assert num_positions(fewer) <= num_positions(rows)


def test_rows_longer_than_a_pack_are_cut_as_ever(path: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.warns(UserWarning, match="longer than max_length=20 tokens and cut"):
        data = ready(path, tokenizer, max_length=20)
    batches = list(data.train_dataloader())
    assert all(batch["input_ids"].shape[1] <= 20 for batch in batches)
    assert sorted(chain.from_iterable(map(examples, batches))) == sorted(expected(data))


def num_positions(batch: dict[str, Tensor]) -> int:
    return batch["input_ids"].numel()


@pytest.mark.parametrize("packing", ["length", "batch"])
def test_statistics_are_what_the_batches_hold(
    path: str, tokenizer: PreTrainedTokenizerFast, packing: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        data = ready(path, tokenizer, packing=packing, batch_size=3)
    counts = data.statistics["train"]
    batches = list(data.train_dataloader())
    assert counts.packed_rows == sum(len(batch["input_ids"]) for batch in batches)
    assert counts.filled == pytest.approx(counts.tokens / sum(map(num_positions, batches)))
    data.setup("fit")
    assert data.statistics["train"] == counts, "set up again"
    padded = ready(path, tokenizer, packing=False, batch_size=3)
    assert counts.filled_unpacked == pytest.approx(counts.tokens / sum(map(num_positions, padded.train_dataloader())))
    assert padded.statistics["train"].filled is None
    assert counts.filled is not None
    assert counts.filled_unpacked is not None
    assert counts.filled > counts.filled_unpacked
    assert f"{NUM_ROWS} rows packed into {counts.packed_rows}; {counts.filled:.1%} of the positions" in caplog.text


def test_validation_rows_are_not_packed(path: str, tokenizer: PreTrainedTokenizerFast) -> None:
    data = SFTDataModule(path, path, path, tokenizer=tokenizer, packing=True)
    data.setup()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert next(iter(loader)).keys() == {"input_ids", "attention_mask", "labels", "facts"}


@pytest.mark.parametrize("options", [{}, {"overfit_batches": 2}])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_trainer_trains_on_packs(
    path: str, tokenizer: PreTrainedTokenizerFast, num_workers: int, options: dict[str, Any]
) -> None:
    model = Bigram(tokenizer)
    trainer = Trainer(**QUIET, **options, max_epochs=2)
    data = SFTDataModule(path, batch_size=2, max_length=64, packing=True, num_workers=num_workers)
    trainer.fit(model, datamodule=data)
    seen = list(map(examples, model.batches))
    half = len(seen) // 2
    if options:
        assert seen[:half] == seen[half:]
        return
    first, second = list(chain(*seen[:half])), list(chain(*seen[half:]))
    assert sorted(first) == sorted(second) == sorted(expected(data))
    assert first != second


@pytest.mark.parametrize("packing", ["lenght", "", 1, None, 0.5, ["batch"]])
def test_another_packing_is_refused(packing: Any) -> None:
    with pytest.raises(ConfigError, match=r"packing must be true .or 'length'., 'batch' or false, got "):
        SFTDataModule(packing=packing)


@pytest.mark.parametrize(("given", "packing"), [("true", "length"), ("batch", "batch"), ("false", False)])
def test_packing_comes_from_yaml_and_the_command_line(write: Write, given: str, packing: Any) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SFTDataModule, "data")
    parser.add_argument("--config", action="config")
    config = write("c.yaml", f"data:\n  train: a.jsonl\n  packing: {given}\n")
    for arguments in (["--config", config], ["--data.train=a.jsonl", f"--data.packing={given}"]):
        assert parser.instantiate(parser.parse_args(arguments)).data.packing == packing


def test_lightning_leaves_the_sampler_alone(path: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert isinstance(ready(path, tokenizer).train_dataloader().sampler, DistributedSampler)
