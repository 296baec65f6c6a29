from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from tests.data.conftest import Write

ROWS = [{"text": f"{n:03d}"} for n in range(50)]


def order(data: SFTDataModule, epoch: int) -> list[str]:
    loader = data.train_dataloader()
    sampler: Any = loader.sampler
    sampler.set_epoch(epoch)
    tokenizer: Any = data.tokenizer
    return [text[:3] for batch in loader for text in tokenizer.batch_decode(batch["input_ids"])]


@pytest.fixture
def path(write: Write) -> str:
    return write("a.jsonl", ROWS)


def ready(path: str, tokenizer: PreTrainedTokenizerFast, **options: int) -> SFTDataModule:
    data = SFTDataModule(path, tokenizer=tokenizer, **options)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def test_the_same_seed_gives_the_same_order(path: str, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    first = order(ready(path, tokenizer, seed=3), epoch=0)
    torch.manual_seed(2)
    second = ready(path, tokenizer, seed=3, batch_size=5)
    torch.rand(7)
    assert order(second, epoch=0) == first
    assert sorted(first) == sorted(row["text"] for row in ROWS)
    assert first != sorted(first)


def test_seeds_and_epochs_have_orders_of_their_own(path: str, tokenizer: PreTrainedTokenizerFast) -> None:
    orders = [
        tuple(order(ready(path, tokenizer, seed=seed), epoch)) for seed in (0, 1, 2**32, 2**70) for epoch in range(3)
    ]
    assert len(set(orders)) == 12


def test_reading_the_data_draws_nothing_from_the_global_generator(
    path: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    order(ready(path, tokenizer), epoch=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_validation_and_test_keep_the_order_of_the_file(
    path: str, tokenizer: PreTrainedTokenizerFast, split: str
) -> None:
    data = SFTDataModule(None, path, path, tokenizer=tokenizer)
    data.setup("validate" if split == "validation" else "predict")
    loader = data.val_dataloader() if split == "validation" else data.predict_dataloader()
    texts = [text[:3] for batch in loader for text in tokenizer.batch_decode(batch["input_ids"])]
    assert texts == [row["text"] for row in ROWS]
