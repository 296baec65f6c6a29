from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from tests.data.conftest import Write
from tests.support.tiny_tokenizer import MARKED, OPEN, SPOKEN, UNMARKED, tiny_tokenizer

CHAT = [
    ("system", "Be brief."),
    ("user", "Hello there, how are you?"),
    ("assistant", "I am well."),
    ("user", "What is the answer?"),
    ("assistant", "five\n\n"),
]


def chat(turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def only_row(path: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    data = SFTDataModule(path, tokenizer=tokenizer)
    data.setup()
    row = data.rows["train"][0]
    return row["input_ids"], row["supervised"]


def pieces(tokenizer: PreTrainedTokenizerFast, *parts: tuple[str, bool]) -> tuple[list[int], list[bool]]:
    """Ids and mask put together by hand; the texts are cut where the tokenizer cuts."""
    encoded = [(tokenizer.encode(text, add_special_tokens=False), trained) for text, trained in parts]
    return [i for ids, _ in encoded for i in ids], [trained for ids, trained in encoded for _ in ids]


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize("trims", [True, False])
def test_only_the_assistant_and_its_end_token_are_trained(write: Write, template: str, trims: bool) -> None:
    tokenizer = tiny_tokenizer(template, trims=trims)
    assert only_row(write("a.jsonl", [chat(CHAT)]), tokenizer) == pieces(
        tokenizer,
        ("<|system|>\nBe brief.<|end|>\n<|user|>\nHello there, how are you?<|end|>\n<|assistant|>\n", False),
        ("I am well.<|end|>", True),
        ("\n<|user|>\nWhat is the answer?<|end|>\n<|assistant|>\n", False),
        ("five\n\n<|end|>", True),
        ("\n", False),
    )


@pytest.mark.filterwarnings("ignore:.*the text of a special token")
@pytest.mark.parametrize("answer", [" led by a blank", "é", "日本語", "ends with 👍", "x", "a <|end|> inside"])
@pytest.mark.parametrize("trims", [True, False])
def test_both_ways_to_find_the_answers_agree(write: Write, answer: str, trims: bool) -> None:
    path = write("a.jsonl", [chat([*CHAT[:2], ("assistant", answer), ("user", "Go on."), ("assistant", answer)])])
    ids, mask = only_row(path, tokenizer := tiny_tokenizer(MARKED, trims=trims))
    assert (ids, mask) == only_row(path, tiny_tokenizer(UNMARKED, trims=trims))
    assert tokenizer.decode([i for i, trained in zip(ids, mask, strict=True) if trained]) == 2 * f"{answer}<|end|>"


@pytest.mark.filterwarnings("ignore:.*does not learn to stop")
@pytest.mark.parametrize("trims", [True, False])
def test_a_line_break_that_ends_a_turn_is_trained(write: Write, trims: bool) -> None:
    tokenizer = tiny_tokenizer(SPOKEN, trims=trims)
    ids, mask = only_row(write("a.jsonl", [chat([*CHAT[1:3], *CHAT[1:3]])]), tokenizer)
    trained = [i for i, used in zip(ids, mask, strict=True) if used]
    assert tokenizer.decode(trained) == 2 * " I am well.\n\n"


@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize("answer", ["five  ", "  five", " é"])
def test_blanks_at_the_edge_and_an_end_outside_the_marks_are_trained(write: Write, answer: str, trims: bool) -> None:
    tokenizer = tiny_tokenizer(OPEN, trims=trims)
    ids, mask = only_row(write("a.jsonl", [{"question": "Hello", "answer": answer}]), tokenizer)
    assert tokenizer.decode([i for i, used in zip(ids, mask, strict=True) if used]) == f"{answer}<|end|>"


@pytest.mark.filterwarnings("ignore:train. 1 of 1 rows ending with a turn")
@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_a_question_at_the_end_is_kept_but_not_trained(write: Write, template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    ids, mask = only_row(write("a.jsonl", [chat([*CHAT, ("user", "Thanks.")])]), tokenizer)
    expected_ids, expected_mask = only_row(write("b.jsonl", [chat(CHAT)]), tokenizer)
    assert (ids[: len(expected_ids)], mask[: len(expected_ids)]) == (expected_ids, expected_mask)
    assert not any(mask[len(expected_ids) :])


@pytest.mark.parametrize("starts", [True, False])
def test_without_a_template_the_sides_are_tokenised_apart(write: Write, starts: bool) -> None:
    tokenizer = tiny_tokenizer(None, starts=starts)
    start = [("<|start|>", False)] if starts else []
    assert only_row(write("a.jsonl", [{"prompt": "Hello", "completion": "\n\nfive"}]), tokenizer) == pieces(
        tokenizer, *start, ("Hello\n", False), ("\n\nfive", True), ("<|end|>", True)
    )


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("template", [MARKED, None], ids=["template", "no template"])
def test_a_text_is_trained_from_end_to_end(write: Write, starts: bool, template: str | None) -> None:
    tokenizer = tiny_tokenizer(template, starts=starts)
    ids, mask = only_row(write("a.jsonl", [{"text": "Hello there"}]), tokenizer)
    assert tokenizer.decode(ids) == ("<|start|>" if starts else "") + "Hello there<|end|>"
    assert mask == [False] + [True] * (len(ids) - 1), "nothing predicts the first token"


def test_batches_are_padded_right_with_labels_only_where_trained(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"question": "Hello", "answer": "five"}, {"question": "Hello", "answer": "five of two"}]
    data = SFTDataModule(None, write("a.jsonl", rows), tokenizer=tokenizer)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    lengths = [len(row["input_ids"]) for row in data.rows["validation"]]  # type: ignore[index]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (2, max(lengths))
    assert {str(tensor.dtype) for name, tensor in batch.items() if name != "facts"} == {"torch.int64"}
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert batch["input_ids"][0, lengths[0] :].tolist() == [tokenizer.pad_token_id] * (lengths[1] - lengths[0])
    for ids, labels, row in zip(batch["input_ids"], batch["labels"], data.rows["validation"], strict=True):
        mask = row["supervised"] + [False] * (max(lengths) - len(row["supervised"]))  # type: ignore[index]
        assert labels.tolist() == [int(i) if trained else -100 for i, trained in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rows_of_one_length_need_no_padding(write: Write, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    data = SFTDataModule(write("a.jsonl", [{"text": "five"}] * 2), tokenizer=tokenizer, batch_size=batch_size)
    data.setup()
    for batch in data.train_dataloader():
        assert batch["attention_mask"].all()
        assert len(batch["labels"]) == batch_size


def test_the_end_token_pads_where_there_is_no_other(write: Write) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    data = SFTDataModule(write("a.jsonl", [{"text": "a"}, {"text": "a longer one"}]), tokenizer=tokenizer)
    data.setup()
    (batch,) = data.train_dataloader()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.eos_token_id).all()
    assert not batch["attention_mask"].all()
