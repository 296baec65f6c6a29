"""Columns beside messages or a question: all that are known are used, all others are named."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.reading import Row, read_rows
from lightning_lora.data.records import Text
from tests.data.formats.reading import chat, conversation, read, rendered

HI = chat(("user", "Hi"), ("assistant", "Yes"))
FORMATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": HI},
    "conversations": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
    "output": {"instruction": "Hi", "input": "", "output": "Yes"},
    "response": {"instruction": "Hi", "response": "Yes"},
    "completion": {"prompt": "Hi", "completion": "Yes"},
    "completion of messages": {"prompt": HI[:1], "completion": HI[1:]},
    "answer": {"question": "Hi", "answer": "Yes"},
}
QUESTIONS = {name: row for name, row in FORMATS.items() if name in ("output", "response", "completion", "answer")}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_takes_a_system_prompt_variables_and_a_weight(name: str) -> None:
    documents = [{"title": "t", "text": "d"}, "plain"]
    beside = {"system": "Rhyme.", "documents": documents, "chat_template_kwargs": {"a": 1, "b": None}, "weight": 2}
    record = conversation({"id": 7, **FORMATS[name], **beside, "source": "x", "absent": None, "blank": ""})
    assert record.messages == [{"role": "system", "content": "Rhyme."}, *HI]
    assert record.variables == {"a": 1, "documents": [documents[0], {"text": "plain"}]}
    assert record.weight == 2.0
    assert record.unused == {"id", "source"}
    nothing = dict.fromkeys(beside)
    assert conversation({**FORMATS[name], **nothing}) == conversation(FORMATS[name])
    assert conversation({**FORMATS[name], **dict.fromkeys(beside, "")}) == conversation(FORMATS[name])


@pytest.mark.parametrize("role", ["system", "developer"])
def test_messages_that_begin_with_a_system_message_keep_it(role: str) -> None:
    messages = [{"role": role, "content": "Rhyme."}, *HI]
    same = conversation({"messages": messages, "system": "Rhyme."})
    assert same.messages == [{"role": "system", "content": "Rhyme."}, *HI]
    assert same.unused == frozenset()
    other = conversation({"messages": messages, "system": "Rap."})
    assert other.messages == same.messages
    assert other.unused == {"system"}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_system_prompt_does_not_move_the_mask(name: str) -> None:
    record = conversation(
        {**QUESTIONS[name], "system": "s", "history": [["a", "b"], ["c", "d"]]}, train_on="last answer"
    )
    assert record.messages[:5] == chat(
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    )
    assert record.untrained == {2, 4}


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("history", [[["a", "b"]], '[["a", "b"]]', [("a", "b")]])
def test_history_comes_before_the_question(name: str, history: Any) -> None:
    record = conversation({**QUESTIONS[name], "history": history})
    assert record.messages == chat(("user", "a"), ("assistant", "b"), ("user", "Hi"), ("assistant", "Yes"))
    assert record.untrained == frozenset()
    assert conversation({**QUESTIONS[name], "history": []}).messages == HI


OPTIONS: dict[str, tuple[Any, str]] = {
    "texts": (["A) x", "B) y"], "A) x\nB) y"),
    "JSON text": ('["x", "y"]', "x\ny"),
    "text": ("A) x\nB) y", "A) x\nB) y"),
    "numbers": ([1, 2.5], "1\n2.5"),
    "labels and texts": ({"label": ["A", "B"], "text": ["x", "y"]}, "A. x\nB. y"),
    "texts of an object": ({"text": ["x", "y"]}, "x\ny"),
    "objects": ([{"label": "A", "text": "x"}, {"text": "y", "label": None}], "A. x\ny"),
    "letters": ({"A": "x", "B": "y", "C": None}, "A. x\nB. y"),
    "none": ([], ""),
}


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("column", ["options", "choices"])
@pytest.mark.parametrize("case", OPTIONS)
def test_options_follow_the_question_one_on_a_line(name: str, column: str, case: str) -> None:
    options, shown = OPTIONS[case]
    record = conversation({**QUESTIONS[name], column: options})
    assert record.messages[0]["content"] == f"Hi\n{shown}".strip()
    assert record.unused == frozenset()


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_passage_follows_after_an_empty_line(name: str) -> None:
    record = conversation({**QUESTIONS[name], "context": "The pier opened in 1911.", "options": ["x"]})
    assert record.messages == chat(("user", "Hi\nx\n\nThe pier opened in 1911."), ("assistant", "Yes"))
    row = {"instruction": "Hi", "input": "a", "context": "b", "output": "Yes"}
    assert conversation(row).messages[0]["content"] == "Hi\n\na\n\nb"


def test_columns_that_a_format_does_not_use_are_named() -> None:
    question = {"context": "c", "options": ["o"], "choices": ["o"], "history": [["a", "b"]], "input": "i"}
    for name in ("messages", "conversations", "completion of messages"):
        assert conversation({**FORMATS[name], **question}).unused == question.keys()
    assert conversation({**FORMATS["answer"], "input": "i"}).unused == {"input"}
    assert conversation({**FORMATS["messages"], "prompt": "p", "text": "t"}).unused == {"prompt", "text"}
    text = read({"text": "t", "system": "s", "tools": [], "id": 0, "weight": "0.5"})
    assert text == Text("rows, row 0", "t", 0.5, frozenset({"system", "tools", "id"}))


def test_a_csv_may_hold_everything_as_json_text(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "sum", "parameters": {}}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "sum", "arguments": '{"x": null}'}]}
    given = {
        "messages": [HI[0], call, HI[1]],
        "tools": [tool],
        "chat_template_kwargs": {"enable_thinking": False},
        "documents": [{"text": "d"}],
    }
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*given, "weight", "system"])
        writer.writerow([*map(json.dumps, given.values()), "0.5", ""])
    (row,) = read_rows(tmp_path / "a.csv")
    assert isinstance(row, Row)
    record = conversation(row.columns)
    assert record.messages[1]["tool_calls"][0]["function"] == {"name": "sum", "arguments": {"x": None}}
    assert record.variables == {"tools": [tool], "documents": given["documents"], "enable_thinking": False}
    assert record.weight == 0.5
    assert record.unused == frozenset()


def test_tools_are_shown_by_the_template() -> None:
    row = {**FORMATS["answer"], "tools": [{"name": "sum"}]}
    assert rendered(conversation(row)).startswith('tools=[{"type": "function", "function": {"name": "sum"}}] role=user')


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "weight -1": ({"weight": -1}, "'weight' must be a finite number of at least 0", ", got -1 (int)."),
    "weight true": ({"weight": True}, "'weight' must be a finite number of at least 0", ", got True"),
    "weight text": ({"weight": "much"}, "'weight' must be a finite number of at least 0", ", got 'much'"),
    "weight NaN": ({"weight": float("nan")}, "'weight' must be a finite number of at least 0", ", got nan"),
    "weight infinite": ({"weight": "inf"}, "'weight' must be a finite number of at least 0", ", got 'inf'"),
    "weight list": ({"weight": [1]}, "'weight' must be a finite number of at least 0", ", got [1]"),
    "system": ({"system": 5}, "'system' must be text", ", got 5 (int)."),
    "kwargs": ({"chat_template_kwargs": "a=1"}, "'chat_template_kwargs' must be an object", ", got 'a=1'"),
    "kwargs list": ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object", ", got [1]"),
    "documents": ({"documents": "d"}, "'documents' must be a list of objects or texts", ", got 'd'"),
    "document": ({"documents": [5]}, "'documents' must be a list of objects or texts", ", got [5]"),
    "history": ({"history": "a"}, "'history' must be a list of pairs of question and answer", ", got 'a'"),
    "no pair": ({"history": [["a"]]}, "'history' must be a list of pairs of question and answer", ", got [['a']]"),
    "no answer": ({"history": [["a", None]]}, "'answer' must be text", ", got None"),
    "options": ({"options": [["a"]]}, "'options' must be a list of texts", ", got [['a']]"),
    "context": ({"context": ["a"]}, "'context' must be text", ", got ['a']"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_column_is_named_and_its_kind_holds_no_value_of_it(case: str) -> None:
    columns, kind, detail = BAD[case]
    with pytest.raises(RowError) as caught:
        conversation({**FORMATS["answer"], **columns})
    assert caught.value.place.startswith("rows, row 0")
    assert kind in caught.value.kind
    assert detail in str(caught.value)
    assert detail not in caught.value.kind


def test_the_conversation_decides_what_the_template_is_given_first() -> None:
    with pytest.raises(RowError, match="'chat_template_kwargs' may not set 'add_generation_prompt'"):
        conversation({**FORMATS["answer"], "chat_template_kwargs": {"add_generation_prompt": True}})
    both = {"chat_template_kwargs": {"tools": [1]}, "tools": [{"name": "sum"}]}
    assert conversation({**FORMATS["answer"], **both}).variables["tools"][0]["function"] == {"name": "sum"}


def test_text_that_python_wrote_is_told_to_be_json() -> None:
    with pytest.raises(RowError, match=r"must be a list of turns .* write it with json\.dumps, not with str"):
        conversation({"messages": str(HI)})
