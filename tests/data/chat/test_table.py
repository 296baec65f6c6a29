"""What each behaviour of chat templates trains, compared with texts written by hand."""

from __future__ import annotations

import random
from itertools import groupby
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.encoding import Encoded, encode
from lightning_lora.data.records import Conversation
from lightning_lora.data.settings import RowSettings
from tests.data.chat.templates import CALL, FAMILIES, SITUATIONS, TOOL, Family, assistant, user


def variables(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {"tools": [TOOL]} if any(message["role"] == "tool" for message in messages) else {}


def encoded(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **settings: Any) -> list[Encoded]:
    record = Conversation("here", messages, variables=variables(messages))
    (rows,) = encode(tokenizer, [record], RowSettings(1024, **settings))
    if isinstance(rows, RowError):
        raise rows
    return rows


def runs(row: Encoded) -> list[tuple[int, int]]:
    """Begin and end of each run of trained tokens."""
    found, position = [], 0
    for trained, group in groupby(row.supervised):
        length = len(list(group))
        if trained:
            found.append((position, position + length))
        position += length
    return found


def trained(tokenizer: PreTrainedTokenizerFast, row: Encoded) -> list[str]:
    return [str(tokenizer.decode(row.ids[first:last])) for first, last in runs(row)]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_is_what_inference_writes(name: str, situation: str) -> None:
    family, tokenizer = FAMILIES[name], FAMILIES[name].tokenizer()
    messages, wanted = family.messages(SITUATIONS[situation]), family.rows(situation)
    if wanted is None:
        with pytest.raises(RowError, match=r"the chat template refuses .*: roles must alternate \(line 1 of"):
            encoded(tokenizer, messages)
        return
    found = [trained(tokenizer, row) for row in encoded(tokenizer, messages)]
    assert found == wanted
    assert all(text.endswith(family.end) for row in found for text in row)


def conversation(family: Family, draw: random.Random) -> list[dict[str, Any]]:
    """A random conversation that the family can render."""
    words = ["five", "two and three", "é", "日本", "x 👍", "Hello there", "I am well.\n\nGood"]
    messages = [{"role": "system", "content": draw.choice(words)}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 6)):
        messages.append(user(draw.choice(words)))
        if family.tools is not None and draw.random() < 0.3:
            messages += [assistant(draw.choice([None, "five"]), tool_calls=[CALL]), {"role": "tool", "content": "two"}]
        thought = {"reasoning_content": draw.choice(words)} if draw.random() < 0.4 else {}
        messages.append(assistant(draw.choice(words), **thought))
    return family.messages(messages)


@pytest.mark.parametrize("name", FAMILIES)
def test_before_each_answer_stand_the_tokens_of_the_prompt(name: str) -> None:
    family, tokenizer = FAMILIES[name], FAMILIES[name].tokenizer()
    for seed in range(12):
        messages = conversation(family, random.Random(seed))
        rows = encoded(tokenizer, messages)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        starts = [(row, first) for row in rows for first, _ in runs(row)]
        assert len(starts) == len(answers)
        for (row, first), number in zip(starts, answers, strict=True):
            prompt: Any = tokenizer.apply_chat_template(
                messages[:number], add_generation_prompt=True, return_dict=False, **variables(messages)
            )
            assert row.ids[:first].tolist() == prompt, (seed, number)


@pytest.mark.parametrize(
    "name", sorted(set(FAMILIES) - {"thinking opened by the prompt", "number of messages before each"})
)
def test_a_row_is_the_whole_conversation_where_it_can_be(name: str) -> None:
    family, tokenizer = FAMILIES[name], FAMILIES[name].tokenizer()
    for situation in ("one turn", "system", "two turns", "thinking"):
        messages, rows = SITUATIONS[situation], encoded(tokenizer, SITUATIONS[situation])
        assert len(rows) == len(family.rows(situation) or ())
        assert rows[-1].ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False), situation


def test_messages_that_are_not_to_be_trained_are_not() -> None:
    record = Conversation("here", SITUATIONS["two turns"], untrained=frozenset({1}))
    for name, wanted in ("plain", "d.<|end|>"), ("thinking in the last turn only", "<think></think>d.<|end|>"):
        tokenizer = FAMILIES[name].tokenizer()
        (rows,) = encode(tokenizer, [record], RowSettings(1024))
        assert isinstance(rows, list)
        assert [trained(tokenizer, row) for row in rows] == [[wanted]]
