"""Edges of texts: tokens that are there already, answers that begin with a line break, typed special tokens."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_lora.data.encoding import Encoded, encode
from lightning_lora.data.records import Conversation, Text
from lightning_lora.data.settings import RowSettings
from tests.data.chat.templates import FAMILIES, assistant, build, user
from tests.data.chat.test_table import encoded, runs, trained
from tests.support.tiny_tokenizer import MARKED, UNMARKED, tiny_tokenizer


def one(tokenizer: PreTrainedTokenizerFast, record: Conversation | Text, separator: str = "\n") -> Encoded:
    ((row,),) = encode(tokenizer, [record], RowSettings(1024, prompt_separator=separator))  # type: ignore[misc]
    return row


@pytest.mark.parametrize(
    ("text", "whole", "told"),
    [
        ("Hello", "<|start|>Hello<|end|>", False),
        ("<|start|>Hello", "<|start|>Hello<|end|>", True),
        ("Hello<|end|>", "<|start|>Hello<|end|>", True),
        ("<|start|>Hello<|end|>\n", "<|start|>Hello<|end|>\n", True),
        ("<|user|>\nHello<|end|>\n<|assistant|>\nfive<|end|>\n", None, True),
        ("Hello <|end|> you", "<|start|>Hello <|end|> you<|end|>", False),
    ],
)
@pytest.mark.parametrize("template", [MARKED, None], ids=["template", "no template"])
def test_begin_and_end_of_a_text_are_not_doubled(
    text: str, whole: str | None, told: bool, template: str | None
) -> None:
    tokenizer = tiny_tokenizer(template, starts=True)
    row = one(tokenizer, Text("here", text))
    assert tokenizer.decode(row.ids) == (whole or text)
    assert row.supervised.tolist() == [False] + [True] * (len(row.ids) - 1)
    assert any("already" in note for note in row.notes) == told


def test_a_rendered_chat_ends_with_the_token_of_its_turns() -> None:
    tokenizer = tiny_tokenizer(build().replace("<|end|>", "<|pad|>"))
    text = "<|user|>\na?<|pad|>\n<|assistant|>\nb.<|pad|>\n"
    assert tokenizer.decode(one(tokenizer, Text("here", text)).ids) == text


@pytest.mark.parametrize(
    ("prompt", "separator", "between"),
    [("Hello", "\n", "\n"), ("Hello\n", "\n", ""), ("Hello ", "\n", ""), ("Hello", "", ""), ("Hello", " => ", " => ")],
)
def test_the_separator_stands_between_prompt_and_answer(prompt: str, separator: str, between: str) -> None:
    tokenizer = tiny_tokenizer(None)
    row = one(tokenizer, Conversation("here", [user(prompt), assistant("five")]), separator)
    ((first, last),) = runs(row)
    assert tokenizer.decode(row.ids[:first]) == prompt + between
    assert tokenizer.decode(row.ids[first:last]) == "five<|end|>"


def test_the_end_of_an_answer_without_template_is_not_doubled() -> None:
    tokenizer = tiny_tokenizer(None)
    row = one(tokenizer, Conversation("here", [user("Hello"), assistant("five<|end|>")]))
    assert trained(tokenizer, row) == ["five<|end|>"]
    assert any("already" in note for note in row.notes)


@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize("answer", ["\nfive", "\n\nfive", "\n", "five", " five"])
@pytest.mark.parametrize("template", [UNMARKED, MARKED], ids=["unmarked", "marked"])
def test_no_token_reaches_from_the_prompt_into_the_answer(answer: str, trims: bool, template: str) -> None:
    tokenizer = tiny_tokenizer(template, trims=trims)
    tokenizer.add_tokens("\n\n")
    messages = [user("a?"), assistant(answer), user("c?"), assistant("d.")]
    (row,) = encoded(tokenizer, messages)
    assert trained(tokenizer, row) == [f"{answer}<|end|>", "d.<|end|>"]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert row.ids[: runs(row)[0][0]].tolist() == prompt
    whole: Any = tokenizer.apply_chat_template(messages, return_dict=False)
    text = tokenizer.decode(whole)
    assert tokenizer.decode(row.ids) == text
    assert (row.ids.tolist() == whole) == (not answer.startswith("\n")), "cut only where a token would reach across"


@pytest.mark.parametrize("trims", [True, False])
def test_a_blank_at_the_end_of_the_prompt_does_not_join_the_answer(trims: bool) -> None:
    turn = "user: {{ m.content }} assistant: "
    template = build("{{ m.content }}<|end|>", turn, start="", prompt="")
    tokenizer = tiny_tokenizer(template, trims=trims)
    (row,) = encoded(tokenizer, [user("a?"), assistant("the answer")])
    ((first, last),) = runs(row)
    assert tokenizer.decode(row.ids[:first]) == "user: a? assistant: "
    assert tokenizer.decode(row.ids[first:last]) == "the answer<|end|>"


@pytest.mark.parametrize("name", ["plain", "thinking in the last turn only"])
def test_special_tokens_in_a_message_become_real_and_are_told(name: str) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    rows = encoded(tokenizer, [user("what is <|start|>?"), assistant("five")])
    assert tokenizer.convert_tokens_to_ids("<|start|>") in rows[0].ids
    assert all(any("text of a special token" in note for note in row.notes) for row in rows)
    assert not encoded(tokenizer, [user("what is <start>?"), assistant("five")])[0].notes


def test_an_opening_by_the_assistant_is_kept_but_not_trained() -> None:
    tokenizer = FAMILIES["plain"].tokenizer()
    (row,) = encoded(tokenizer, [assistant("Welcome."), user("a?"), assistant("b.")])
    assert trained(tokenizer, row) == ["b.<|end|>"]
    assert str(tokenizer.decode(row.ids)).startswith("<|assistant|>\nWelcome.")
    assert any("no prompt before it" in note for note in row.notes)
