"""Conversations held out for validation, and limits that count conversations."""

from __future__ import annotations

from typing import Any

import jsonargparse
import pytest
from datasets import Dataset
from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule, encoding, token_table
from lightning_lora.data.sampling.hold_out import hold_out
from lightning_lora.errors import ConfigError, DataError
from tests.data.conftest import QUIET, Write
from tests.data.test_training import Bigram

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '\\w+' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]

ROWS = [{"question": f"{n:03d}", "answer": "five"} for n in range(50)]


def ready(path: Any, tokenizer: PreTrainedTokenizerFast, stage: str | None = "fit", **options: Any) -> SFTDataModule:
    options = {"validation_share": 0.2} | options
    data = SFTDataModule(path, tokenizer=tokenizer, **options)
    data.setup(stage)
    return data


def places(data: SFTDataModule, split: str) -> list[int]:
    """Numbers of the rows of the file in a split."""
    return [int(place.split(", row ")[1].split(" ")[0]) for place in data.rows[split]["place"]]


def test_a_share_of_the_rows_is_held_out_and_told(
    write: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        data = ready(write("a.jsonl", ROWS), tokenizer)
    held, left = places(data, "validation"), places(data, "train")
    assert sorted(held + left) == list(range(50))
    assert len(held) == data.statistics["validation"].rows == 10
    assert held == sorted(held)
    assert held != list(range(10))
    assert "train: 10 of 50 conversations (20.0%) are held out for validation, 40 are trained on" in caplog.text
    assert len(list(data.val_dataloader())) == 2
    assert sum(len(batch["input_ids"]) for batch in data.train_dataloader()) == 40


def test_the_choice_depends_on_the_seed_alone(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", ROWS)
    first = places(ready(path, tokenizer, seed=3), "validation")
    assert places(ready(path, tokenizer, "validate", seed=3, batch_size=2), "validation") == first
    assert places(ready(path, tokenizer, None, seed=3, packing=True), "validation") == first
    chosen = {tuple(places(ready(path, tokenizer, seed=seed), "validation")) for seed in range(4)}
    assert len(chosen) == 4
    more = places(
        ready(write("b.jsonl", [*ROWS, {"question": "new", "answer": "five"}]), tokenizer, seed=3), "validation"
    )
    assert len(set(more) - {50} - set(first)) <= 1, "a further row changes little"


def test_rows_with_the_same_tokens_stay_on_one_side(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", [ROWS[n % 20] for n in range(50)])
    for seed in range(5):
        data = ready([path, write("b.jsonl", ROWS[:10])], tokenizer, seed=seed)
        train, validation = ({tuple(ids) for ids in data.rows[split]["input_ids"]} for split in ("train", "validation"))
        assert not train & validation
        assert data.statistics["validation"].rows == 12


def row_per_answer(_tokenizer: Any, records: Any, settings: Any) -> Any:
    """Stands for a template that renders earlier turns differently: one row of tokens for each answer."""
    whole: Any = encoding_encode(_tokenizer, records, settings)
    return [[row] * (1 + int(record.messages[0]["content"]) % 3) for record, (row,) in zip(records, whole, strict=True)]


encoding_encode = encoding.encode


@pytest.fixture
def split_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_table, "encode", row_per_answer)


@pytest.mark.usefixtures("split_rows")
def test_all_rows_of_a_conversation_stay_on_one_side(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    data = ready(write("a.jsonl", ROWS), tokenizer)
    held, left = places(data, "validation"), places(data, "train")
    assert len(set(held)) == 10
    assert not set(held) & set(left)
    assert sorted(held + left) == sorted(n for n in range(50) for _ in range(1 + n % 3))


@pytest.mark.usefixtures("split_rows")
def test_a_limit_counts_conversations_and_cuts_none(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    def rows(*numbers: int) -> list[int]:
        return [n for n in numbers for _ in range(1 + n % 3)]

    a, b = write("a.jsonl", ROWS[:8]), write("b.jsonl", ROWS[20:])
    data = ready([a, b], tokenizer, validation_share=None, max_rows=11, validation=b, validation_rows=2)
    assert places(data, "train") == [*rows(*range(8)), 0, 0, 0, 1, 2, 2]
    assert places(data, "validation") == [0, 0, 0, 1]
    held = ready(a, tokenizer, max_rows=7, validation_share=0.5, validation_rows=2)
    assert len(set(places(held, "validation"))) == 2
    assert set(places(held, "train")) | set(places(held, "validation")) <= set(range(7))


def test_conversations_with_a_row_in_common_stay_together() -> None:
    """The first row of a long conversation is the only one of a short one."""
    rows = Dataset.from_dict({"input_ids": [[1], [1], [2], [2], [3], [4], [5]], "conversation": [0, 1, 1, 2, 3, 4, 5]})
    for seed in range(8):
        held = hold_out(rows, 0.5, seed).tolist()
        assert len(set(held[:4])) == 1
        assert sum(held) == (4 if held[0] else 3)
        assert hold_out(rows.select(range(6, -1, -1)), 0.5, seed).tolist() == held[::-1]


def test_a_trainer_validates_on_them(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", ROWS)
    model = Bigram(tokenizer)
    trainer = Trainer(**QUIET, max_epochs=1, num_sanity_val_steps=0)
    data = SFTDataModule({path: 1}, batch_size=5, validation_share=0.1)
    trainer.fit(model, datamodule=data)
    assert [len(batch["input_ids"]) for batch in model.batches] == [5] * 10
    before = data.rows["validation"]["place"]
    trainer.validate(model, datamodule=data, verbose=False)
    assert data.rows["validation"]["place"] == before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{f"{share}": ({"train": "a", "validation_share": share}, f"a number between 0 and 1, got {share!r}")
       for share in (0.0, 1.0, -0.1, 1.5, float("nan"), True, 1, "0.1")},
    "validation": ({"train": "a", "validation": "b", "validation_share": 0.1}, "validation has its own: give one"),
    "no train": ({"test": "a", "validation_share": 0.1}, "takes rows from train, which is not given"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_another_share_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        SFTDataModule(**options)


@pytest.mark.parametrize("count", [1, 6])
def test_rows_that_cannot_be_divided_are_refused(write: Write, tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    with pytest.raises(
        DataError, match=rf"nothing can be held out for validation of {count} conv.*{count} of which are"
    ):
        ready(write("a.jsonl", ROWS[:1] * count), tokenizer)


def test_one_conversation_at_least_is_on_each_side(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", ROWS[:4])
    assert ready(path, tokenizer, validation_share=0.01).statistics["validation"].rows == 1
    assert ready(path, tokenizer, validation_share=0.99).statistics["train"].rows == 1


def test_the_share_comes_from_the_command_line() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SFTDataModule, "data")
    parsed = parser.parse_args(["--data.train=a.jsonl", "--data.validation_share=0.1"])
    assert parser.instantiate(parsed).data.validation_share == 0.1


def test_rows_on_both_sides_are_counted_and_told(
    write: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """B81."""
    train, other = write("a.jsonl", ROWS[:30]), write("b.jsonl", ROWS[28:])
    with caplog.at_level("INFO"):
        ready(train, tokenizer, validation=other, validation_share=None)
    assert "validation: 2 of 22 rows are training rows too, token for token" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        ready(train, tokenizer)
        ready(train, tokenizer, validation=write("c.jsonl", ROWS[30:]), validation_share=None)
    assert "token for token" not in caplog.text
