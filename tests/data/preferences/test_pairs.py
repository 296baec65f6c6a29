"""Pairs from files to batches: every shape of a row gives the same tokens, and what cannot be used is named."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_lora import ConfigError, DataError
from lightning_lora.data import PreferenceDataModule, SFTDataModule
from tests.data.conftest import Write
from tests.support import toys

pytestmark = toys.expected_warnings


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASKED, GOOD, BAD = "what is the sum?", "the answer is five.", "I am well."
SHAPES: dict[str, dict[str, Any]] = {
    "texts": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "a question": {"question": ASKED, "chosen": GOOD, "rejected": BAD},
    "messages": {"prompt": [user(ASKED)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    "whole conversations": {"chosen": [user(ASKED), assistant(GOOD)], "rejected": [user(ASKED), assistant(BAD)]},
    "conversations beside their prompt": {
        "prompt": ASKED, "chosen": [user(ASKED), assistant(GOOD)], "rejected": [user(ASKED), assistant(BAD)],
    },
    "transcripts": {
        "chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {BAD}",
    },
}  # fmt: skip


def module(write: Write, tokenizer: PreTrainedTokenizerFast, rows: list[Any], **settings: Any) -> PreferenceDataModule:
    data = PreferenceDataModule(write("pairs.jsonl", rows), tokenizer=tokenizer, **{"batch_size": 2, **settings})
    data.prepare_data()
    data.setup()
    return data


def text_of(tokenizer: PreTrainedTokenizerFast, ids: Any) -> str:
    return str(tokenizer.decode([int(token) for token in ids if token != -100]))


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_shape_of_a_row_is_the_same_pair(
    row: dict[str, Any], write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    (batch,) = module(write, tokenizer, [row]).train_dataloader()
    assert batch["input_ids"].shape[:2] == (1, 2)
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "facts"}
    plain = SFTDataModule(
        write("plain.jsonl", [{"prompt": ASKED, "completion": answer} for answer in (GOOD, BAD)]),
        tokenizer=tokenizer,
        batch_size=2,
    )
    plain.prepare_data()
    plain.setup()
    for side, (ids, labels) in enumerate(zip(batch["input_ids"][0], batch["labels"][0], strict=True)):
        row_of_sft = plain.rows["train"][side]
        length = int(batch["attention_mask"][0, side].sum())
        assert ids[:length].tolist() == row_of_sft["input_ids"]
        assert (labels[:length] != -100).tolist() == row_of_sft["supervised"]
        assert text_of(tokenizer, labels).startswith((GOOD, BAD)[side])


def test_only_what_differs_is_an_answer(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    begin = [user("Hello there"), assistant("Good."), user(ASKED)]
    row = {"chosen": [*begin, assistant(GOOD)], "rejected": [*begin, assistant(BAD), user("two"), assistant("three")]}
    (batch,) = module(write, tokenizer, [row]).train_dataloader()
    trained = [text_of(tokenizer, labels) for labels in batch["labels"][0]]
    assert "Good" not in trained[0] + trained[1]
    assert GOOD in trained[0]
    assert BAD in trained[1]
    assert "three" in trained[1]
    assert "two" not in trained[1]


def test_margin_weight_and_a_name_of_ones_own(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": ASKED, "better": GOOD, "worse": BAD, "margin": 0.5, "weight": 2},
        {"prompt": ASKED, "better": BAD, "worse": GOOD},
    ]
    data = module(write, tokenizer, rows, columns={"better": "chosen", "worse": "rejected"})
    batches = [
        data._collator("train", data._is_weighted("train"))([data._examples("train")[number] for number in (0, 1)])
    ]
    assert batches[0]["margin"].tolist() == [0.5, 0.0]
    assert batches[0]["weights"].tolist() == [2.0, 1.0]
    torch.testing.assert_close(batches[0]["input_ids"][0], batches[0]["input_ids"][1].flip(0))


def test_an_unused_column_is_said_once(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.warns(UserWarning, match="nothing reads") as caught:
        module(write, tokenizer, [{**SHAPES["texts"], "score": 3}] * 3)
    told = [str(one.message) for one in caught if "'score'" in str(one.message)]
    assert len(told) == 1
    assert "nothing reads 'score' (3 rows)" in told[0]


def test_pairs_stay_together_and_seeds_decide_the_order(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": ASKED, "chosen": f"five {number}", "rejected": f"six {number}"} for number in range(8)]
    data = module(write, tokenizer, rows, batch_size=3, validation_share=0.25)
    assert len(data.rows["train"]) == 12
    assert len(data.rows["validation"]) == 4
    answers = []
    for batch in data.train_dataloader():
        for pair in batch["labels"]:
            chosen, rejected = (text_of(tokenizer, side) for side in pair)
            assert chosen.replace("five", "six") == rejected
            answers.append(chosen)
    assert len(set(answers)) == 6
    assert answers != sorted(answers)
    again = [text_of(tokenizer, pair[0]) for batch in data.train_dataloader() for pair in batch["labels"]]
    assert again == answers


def test_a_pair_whose_prompt_fills_the_row_is_dropped_with_a_count(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = {"prompt": "what is the sum? " * 20, "chosen": GOOD, "rejected": BAD}
    with pytest.warns(UserWarning, match="2 of 4 rows left without a supervised token and dropped"):
        data = module(write, tokenizer, [long, SHAPES["texts"]], max_length=40)
    assert len(data._examples("train")) == 1
    with pytest.raises(DataError, match=r"no row has a supervised token: .* Raise max_length"):
        module(write, tokenizer, [long], max_length=40)


def test_a_pair_that_differs_behind_the_cut_is_dropped(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    same = "Hello there, how are you? " * 5
    row = {"prompt": ASKED, "chosen": same + GOOD, "rejected": same + BAD}
    with pytest.warns(UserWarning, match="2 of 4 rows left without"):
        data = module(write, tokenizer, [row, SHAPES["texts"]], max_length=40)
    kept = data.rows["train"][0]
    assert numpy.any(kept["supervised"])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "equal": ({"prompt": ASKED, "chosen": GOOD, "rejected": GOOD}, "chosen and rejected are equal, so neither is"),
    "empty answer": ({"prompt": ASKED, "chosen": GOOD, "rejected": " "}, "'rejected' is empty"),
    "empty turn": (
        {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant:", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {BAD}"},
        "chosen, turn 1: 'Assistant' is empty",
    ),
    "no answer": (
        {"chosen": [user(ASKED), assistant(GOOD)], "rejected": [user(ASKED)]}, "'rejected' has no answer of its own",
    ),
    "other prompts": (
        {"chosen": [user(ASKED), assistant(GOOD)], "rejected": [user("two"), assistant(GOOD)]},
        "do not answer the same prompt: they differ first in turn 0, the user's",
    ),
    "a question at the end": (
        {"chosen": [user(ASKED), assistant(GOOD), user("two")], "rejected": [user(ASKED), assistant(BAD)]},
        "'chosen' does not end with a turn of the assistant",
    ),
    "no prompt": ({"chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}, "there is no prompt before the answers"),
    "text without prompt": ({"chosen": GOOD, "rejected": BAD}, "'chosen' is a text without its prompt"),
    "margin": ({**SHAPES["texts"], "margin": -1}, "'margin' must be a finite number of at least 0, got -1"),
    "missing column": ({"prompt": ASKED, "chosen": GOOD}, "the columns 'prompt', 'chosen' are no pair. A pair has two"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_named(
    row: dict[str, Any], message: str, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=message):
        module(write, tokenizer, [row])
    if "margin" in row or "rejected" not in row:
        return
    good = SHAPES["texts" if "prompt" in row else "transcripts"]
    with pytest.warns(UserWarning, match="1 of 2 rows left out"):
        data = module(write, tokenizer, [row, good], on_bad_row="skip")
    assert len(data._examples("train")) == 1


def test_pairs_in_supervised_training_are_sent_to_their_module(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = SFTDataModule(write("pairs.jsonl", [SHAPES["transcripts"]]), tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"read by lightning_lora\.data\.PreferenceDataModule"):
        data.prepare_data()


def test_shares_are_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="train takes names without shares"):
        PreferenceDataModule({"a.jsonl": 1.0})  # type: ignore[arg-type]
