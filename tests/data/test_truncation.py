from __future__ import annotations

import warnings

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from lightning_lora.data.split import SplitStatistics
from tests.data.conftest import Write

ROWS = [{"question": "a" * n, "answer": "b"} for n in (1, 2, 3, 30)]


def test_counts_are_right_without_cutting(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = SFTDataModule(path, path, tokenizer=tokenizer)
        data.setup("fit")
    lengths = [len(ids) for ids in data.rows["train"]["input_ids"]]
    assert data.statistics["train"] == data.statistics["validation"]
    assert data.statistics["train"] == SplitStatistics(4, sum(lengths), 2 * 4, 0, 0, max(lengths))


def test_cut_and_dropped_rows_are_counted_and_told(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", ROWS)
    whole = SFTDataModule(path, tokenizer=tokenizer)
    whole.setup()
    lengths = [len(ids) for ids in whole.rows["train"]["input_ids"]]
    # Cut to the second row: of the third the answer is left, of the fourth only a part of the question.
    data = SFTDataModule(path, tokenizer=tokenizer, max_length=lengths[1] - 1)
    with pytest.warns(UserWarning, match="train: ") as caught:
        data.setup()
    (told,) = [str(warning.message) for warning in caught]
    assert f"train: 3 of 4 rows longer than max_length={lengths[1] - 1} tokens and cut" in told
    assert f"(the longest has {lengths[3]})" in told
    assert "1 of 4 rows left without a supervised token and dropped" in told
    kept = data.rows["train"]
    assert [row["place"].split("row ")[1] for row in kept] == ["0 (line 1)", "1 (line 2)", "2 (line 3)"]  # type: ignore[index]
    assert data.statistics["train"] == SplitStatistics(
        rows=3,
        tokens=sum(len(ids) for ids in kept["input_ids"]),
        supervised_tokens=sum(sum(mask) for mask in kept["supervised"]),
        truncated_rows=3,
        dropped_rows=1,
        longest=lengths[3],
    )
    assert max(len(ids) for ids in kept["input_ids"]) == lengths[1] - 1
    assert all(ids == whole.rows["train"][i]["input_ids"][: len(ids)] for i, ids in enumerate(kept["input_ids"]))


def test_a_row_of_exactly_max_length_is_not_cut(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", ROWS[:1])
    data = SFTDataModule(path, tokenizer=tokenizer)
    data.setup()
    longest = data.statistics["train"].longest
    data = SFTDataModule(path, tokenizer=tokenizer, max_length=longest)
    data.setup()
    assert data.statistics["train"].truncated_rows == 0


@pytest.mark.filterwarnings("default:train. 1 of 2 rows ending with a turn that is not the assistant's:UserWarning")
def test_conversations_that_end_with_a_question_are_told(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": role, "content": "five"} for role in ("user", "assistant", "user")]
    data = SFTDataModule(write("a.jsonl", [{"messages": turns}, {"messages": turns[:2]}]), tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="train: 1 of 2 rows ending with a turn that is not the assistant's"):
        data.setup()
    assert data.statistics["train"].rows == 2
