"""Counts of rows of tokens, against counts made by hand and against the batches that training gets."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import numpy
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from lightning_lora.errors import ConfigError, DataError
from lightning_lora.planning.count_data import count_data, unique_rows
from lightning_lora.planning.data_counts import DataCounts
from tests.data.conftest import Write, examples

LONG = 4096


def chat(*texts: str) -> dict[str, Any]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def data(train: Any, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> SFTDataModule:
    return SFTDataModule(train, tokenizer=tokenizer, **{"max_length": LONG, "batch_size": 2, **settings})


def in_batches(datamodule: SFTDataModule) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the examples that an epoch of training gets."""
    datamodule.prepare_data()
    datamodule.setup("fit")
    return [example for batch in datamodule.train_dataloader() for example in examples(batch)]


def agrees(counts: DataCounts, datamodule: SFTDataModule) -> bool:
    """Whether the counts are those of the batches."""
    seen = in_batches(datamodule)
    trained = [sum(label != -100 for label in labels) for _, labels in seen]
    unique = {(tuple(ids), tuple(labels)): number for (ids, labels), number in zip(seen, trained, strict=True)}
    found = counts.rows, counts.supervised_tokens, counts.unique_supervised_tokens, counts.duplicate_rows
    lengths = [len(ids) for ids, _ in seen]
    return (
        found == (len(seen), sum(trained), sum(unique.values()), len(seen) - len(unique))
        and (counts.longest_row, counts.mean_row) == (max(lengths), pytest.approx(numpy.mean(lengths)))
        and counts.bits == sum(unique.values())
    )


def test_trained_tokens_are_the_answers_and_the_tokens_that_end_them(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    rows = [chat("hello?", "the answer is five."), chat("two?", "one", "three?", "two and three"), chat("well?", "0")]
    datamodule = data(write("a.jsonl", rows), tokenizer)
    counts = count_data(datamodule)
    answers = ["the answer is five.", "one", "two and three", "0"]
    assert counts.unit == "tokens"
    assert counts.supervised_tokens == sum(ids(tokenizer, answer) + 1 for answer in answers)
    assert counts.unique_supervised_tokens == counts.supervised_tokens
    assert (counts.rows, counts.duplicate_rows, counts.truncated_rows, counts.unsupervised_rows) == (3, 0, 0, 0)
    assert not counts.remarks()
    assert agrees(counts, datamodule)


def test_an_empty_answer_is_refused_with_its_place_or_left_out(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    path = write("a.jsonl", [chat("a?", "one"), chat("b?", "")])
    with pytest.raises(DataError, match=r"row 1 \(line 2\), messages\[1\]: 'content' is empty"):
        count_data(data(path, tokenizer))
    with pytest.warns(UserWarning, match="1 of 2 rows left out"):
        counts = count_data(data(path, tokenizer, on_bad_row="skip"))
    assert (counts.rows, counts.supervised_tokens) == (1, ids(tokenizer, "one") + 1)


def test_only_the_last_answer_counts_if_only_it_is_trained_on(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    rows = [chat("two?", "one", "three?", "two and three")]
    datamodule = data(write("a.jsonl", rows), tokenizer, train_on="last answer")
    counts = count_data(datamodule)
    assert counts.supervised_tokens == ids(tokenizer, "two and three") + 1
    assert agrees(counts, datamodule)


def test_a_plain_text_counts_whole_but_for_its_first_token(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    text = "what is the sum of two and three?"
    counts = count_data(data(write("a.jsonl", [{"text": text}]), tokenizer))
    assert counts.supervised_tokens == ids(tokenizer, text) + 1 - 1


def test_a_repeated_row_counts_once(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    rows = [chat("a?", "one"), chat("b?", "one"), chat("a?", "one"), chat("a?", "two"), chat("a?", "one")]
    datamodule = data(write("a.jsonl", rows), tokenizer)
    counts = count_data(datamodule)
    one, two = ids(tokenizer, "one") + 1, ids(tokenizer, "two") + 1
    # Another question or another answer makes another row.
    assert (counts.rows, counts.duplicate_rows) == (5, 2)
    assert counts.supervised_tokens == 4 * one + two
    assert counts.unique_supervised_tokens == 2 * one + two
    assert agrees(counts, datamodule)
    assert counts.remarks() == ["2 of 5 rows repeat an earlier one, which counts once."]


def test_rows_with_the_same_tokens_and_other_masks_are_different(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    row = chat("two?", "one", "three?", "two and three")
    masked = {"messages": [{**message, "train": i == 3} for i, message in enumerate(row["messages"])]}
    datamodule = data(write("a.jsonl", [row, masked, row]), tokenizer)
    counts = count_data(datamodule)
    assert counts.duplicate_rows == 1
    assert counts.unique_supervised_tokens == ids(tokenizer, "one") + 1 + 2 * (ids(tokenizer, "two and three") + 1)
    assert agrees(counts, datamodule)


@pytest.mark.filterwarnings("ignore:train. .* of 4 rows")
def test_cut_rows_count_what_is_left_of_them(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    long = "the answer is five. " * 20
    # Two rows are equal up to the cut, one loses its whole answer to it.
    rows = [chat("a?", long), chat("a?", long + "one"), chat("a?", "one"), chat(long, "one")]
    datamodule = data(write("a.jsonl", rows), tokenizer, max_length=24)
    counts = count_data(datamodule)
    assert (counts.rows, counts.truncated_rows, counts.unsupervised_rows, counts.duplicate_rows) == (3, 3, 1, 1)
    assert counts.longest_row == 24
    assert agrees(counts, datamodule)
    assert counts.remarks()[1:] == [
        "3 rows are cut at max_length and lose what comes after it.",
        "1 rows have nothing to learn (no target) and are left out.",
    ]


@pytest.mark.parametrize("packing", [True, "batch"])
def test_packing_changes_the_rows_of_batches_only(
    tokenizer: PreTrainedTokenizerFast, write: Write, packing: bool | str
) -> None:
    draw = random.Random(0)
    rows = [chat(f"{number}?", "one " * draw.randint(1, 9)) for number in range(17)]
    path = write("a.jsonl", rows)
    plain = count_data(data(path, tokenizer))
    datamodule = data(path, tokenizer, packing=packing, max_length=64, batch_size=4)
    counts = count_data(datamodule)
    assert agrees(counts, datamodule)
    assert counts.unique_supervised_tokens == plain.unique_supervised_tokens
    assert plain.packed_rows is None
    batches = list(datamodule.train_dataloader())
    assert counts.packed_rows == sum(len(batch["input_ids"]) for batch in batches)
    # A batch of filled rows is padded to its longest one.
    assert counts.longest_packed_row == max(batch["input_ids"].shape[1] for batch in batches)


def test_an_epoch_of_a_mixture_counts_its_own_rows(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    many = write("many.jsonl", [chat(f"{number}?", "one " * (number % 5 + 1)) for number in range(40)])
    few = write("few.jsonl", [chat(f"few {number}?", "two") for number in range(5)] * 2)
    datamodule = data({many: 0.5, few: 0.5}, tokenizer)
    counts = count_data(datamodule)
    assert (counts.rows, counts.duplicate_rows) == (20, 5)
    assert agrees(counts, datamodule)


def test_only_max_rows_are_counted_and_held_out_rows_are_not(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    path = write("a.jsonl", [chat(f"{number}?", "one") for number in range(20)])
    for settings, rows in (({"max_rows": 7}, 7), ({"validation_share": 0.25}, 15)):
        datamodule = data(path, tokenizer, **settings)
        counts = count_data(datamodule)
        assert counts.rows == rows
        assert agrees(counts, datamodule)


def test_a_stream_is_counted_if_it_ends(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    path = write("a.jsonl", [chat(f"{number // 2}?", "one " * (number % 3 // 2 + 1)) for number in range(30)])
    endless = count_data(data(path, tokenizer, streaming=True))
    assert (endless.unit, endless.rows, endless.unique_supervised_tokens, endless.bits) == ("tokens", None, None, None)
    assert endless.remarks() == [
        "The rows are streamed and max_rows is not set, so they cannot be counted before training."
    ]
    datamodule = data(path, tokenizer, streaming=True, max_rows=21)
    counts = count_data(datamodule)
    assert counts.rows == 21
    assert agrees(counts, datamodule)


def test_rows_of_a_stream_that_are_left_out_do_not_count(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    path = write("a.jsonl", [chat("a?", "one"), chat("b?", ""), chat("c?", "two")])
    with pytest.warns(UserWarning, match="is empty"):
        counts = count_data(data(path, tokenizer, streaming=True, max_rows=3, on_bad_row="skip"))
    assert (counts.rows, counts.unsupervised_rows) == (2, 0)


def test_the_different_rows_have_their_numbers_in_the_dataset(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    many = write("many.jsonl", [chat(f"{number % 30}?", "one " * (number % 5 + 1)) for number in range(40)])
    few = write("few.jsonl", [chat(f"few {number}?", "two") for number in range(30)])
    datamodule = data({many: 0.5, few: 0.5}, tokenizer)
    seen = in_batches(datamodule)
    found = unique_rows(datamodule)
    rows = [datamodule.rows["train"][int(number)] for number in found.numbers]
    assert [len(row["input_ids"]) for row in rows] == found.lengths.tolist()
    assert [sum(row["supervised"]) for row in rows] == found.supervised_tokens.tolist()
    assert sorted(row["input_ids"] for row in rows) == sorted(map(list, {tuple(ids) for ids, _ in seen}))
    assert len(rows) < len(seen)


def test_counting_leaves_data_module_and_random_state_as_they_are(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    datamodule = data(write("a.jsonl", [chat(f"{number}?", "one") for number in range(9)]), tokenizer)
    before = [*datamodule.rows, *datamodule.statistics], datamodule.trainer
    states = random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state()
    order = [ids for ids, _ in in_batches(data(datamodule.sources["train"], tokenizer))]
    count_data(datamodule)
    assert ([*datamodule.rows, *datamodule.statistics], datamodule.trainer) == before
    assert (random.getstate(), repr(numpy.random.get_state())) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [ids for ids, _ in in_batches(datamodule)] == order


def test_nothing_to_learn_is_one_clear_error(tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
    with pytest.raises(DataError, match=r"empty\.jsonl has no rows"):
        count_data(data(write("empty.jsonl", []), tokenizer))
    masked = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b", "train": False}]}
    path = write("masked.jsonl", [masked, masked])
    for settings in ({}, {"streaming": True, "max_rows": 2}):
        with (
            pytest.warns(UserWarning, match="left without a supervised token") if settings else nullcontext(),
            pytest.raises(DataError, match="no row has a supervised token"),
        ):
            count_data(data(path, tokenizer, **settings))
    with pytest.raises(ConfigError, match="fit needs train rows"):
        count_data(data(None, tokenizer, validation=path))


def test_a_completion_beyond_the_context_is_refused_with_both_numbers(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template=tokenizer.chat_template,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=32,
    )
    path = write("a.jsonl", [chat("a?", "the answer is five. " * 30), chat("a?", "one")])
    with pytest.raises(ConfigError, match=r"max_length=4096 is above the context .* 32 tokens, and 1 of 2 train rows"):
        count_data(data(path, tokenizer))
