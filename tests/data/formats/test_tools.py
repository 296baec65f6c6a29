"""Calls, results and definitions of tools, in the formats of data sets, to the shape that stock templates read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_lora.data import SFTDataModule
from lightning_lora.data.bad_rows import RowError
from tests.data.conftest import Write
from tests.data.formats.reading import conversation, rendered
from tests.support.tiny_tokenizer import tiny_tokenizer

SUM = {"name": "sum", "arguments": {"x": 1, "y": [2, None]}}
CALL = {"type": "function", "function": SUM}
NAMED = {"id": "c1", **CALL}
AS_TEXT = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": json.dumps(SUM["arguments"])}}
ASKED = {"role": "user", "content": "1+2?"}
END = [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "Three."}]

# Small templates that behave as stock ones do where they read calls.
WRAPPED = (  # by Qwen3, Hermes: content checked, each call as JSON between tags, results as turns of a user
    "{% for m in messages %}{% if m.role == 'tool' %}<|user|><tool_response>{{ m.content }}</tool_response>"
    "{% else %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
    "{% if c.function %}{% set c = c.function %}{% endif %}<tool_call>{{ c.name }} {{ c.arguments | tojson }}"
    "</tool_call>{% endfor %}{% endif %}<|end|>{% endfor %}"
)
SINGLE = (  # by Llama-3: one call, found by whether the key is there
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call only') }}{% endif %}{% set c = m.tool_calls[0].function %}"
    "<|assistant|>{{ c.name }} {{ c.arguments | tojson }}{% else %}<|{{ m.role }}|>{{ m.content + '' }}{% endif %}"
    "<|end|>{% endfor %}"
)
LISTED = (  # by Mistral: all calls as one list
    "{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls is not none %}[CALLS]"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% else %}[{{ m.role }}]{{ m.content }}"
    "{% endif %}<|end|>{% endfor %}"
)
SHOWN = {
    WRAPPED: '<|assistant|><tool_call>sum {"x": 1, "y": [2, null]}</tool_call><|end|><|user|><tool_response>3',
    SINGLE: '<|assistant|>sum {"x": 1, "y": [2, null]}<|end|><|tool|>3<|end|>',
    LISTED: '[CALLS]{"name": "sum", "arguments": {"x": 1, "y": [2, null]}}<|end|>[tool]3<|end|>',
}

CALLS: dict[str, list[dict[str, Any]]] = {
    "OpenAI, no content": [{"role": "assistant", "tool_calls": [NAMED]}],
    "OpenAI, null content": [{"role": "assistant", "content": None, "tool_calls": [NAMED]}],
    "OpenAI, empty content": [{"role": "assistant", "content": "", "tool_calls": [NAMED]}],
    "OpenAI, arguments as text": [{"role": "assistant", "content": None, "tool_calls": [AS_TEXT]}],
    "OpenAI, all as text": [{"role": "assistant", "content": None, "tool_calls": json.dumps([AS_TEXT])}],
    "OpenAI, calls as texts": [{"role": "assistant", "content": None, "tool_calls": [json.dumps(NAMED)]}],
    "OpenAI, older": [{"role": "assistant", "content": None, "function_call": AS_TEXT["function"]}],
    "flat": [{"role": "assistant", "content": "", "tool_calls": [SUM]}],
    "parameters": [{"role": "assistant", "tool_calls": [{"name": "sum", "parameters": SUM["arguments"]}]}],
    "ShareGPT": [{"from": "function_call", "value": json.dumps(SUM)}],
    "ShareGPT, a list": [{"from": "function_call", "value": json.dumps([SUM])}],
    "ms-swift": [{"role": "tool_call", "content": json.dumps(SUM)}],
    "an object": [{"from": "function_call", "value": SUM}],
}


@pytest.mark.parametrize("template", SHOWN, ids=["wrapped", "single", "listed"])
@pytest.mark.parametrize("case", CALLS)
def test_calls_of_every_format_are_read_by_every_template(case: str, template: str) -> None:
    record = conversation({"messages": [ASKED, *CALLS[case], *END]})
    assert SHOWN[template] in rendered(record, template)
    assert "None" not in rendered(record, template)
    assert record.untrained == frozenset(), "a call is what the assistant writes"


RESULTS: dict[str, tuple[dict[str, Any], str]] = {
    "OpenAI": ({"role": "tool", "content": "3", "tool_call_id": "c1"}, "3"),
    "OpenAI, older": ({"role": "function", "name": "sum", "content": "3"}, "3"),
    "Llama": ({"role": "ipython", "content": "3"}, "3"),
    "ShareGPT": ({"from": "observation", "value": '{"a": 3}'}, '{"a": 3}'),
    "Hermes": ({"from": "tool", "value": '<tool_response>\n{"a": 3}\n</tool_response>'}, '{"a": 3}'),
    "tags inside": ({"from": "tool", "value": "see <tool_response>3</tool_response>"}, "see <tool_response>3</tool_r"),
    "an object": ({"role": "tool", "content": {"a": 3, "é": None}}, '{"a": 3}'),
    "a list": ({"role": "tool", "content": [3, "é"]}, '[3, "é"]'),
    "a number": ({"role": "tool", "content": 3.5}, "3.5"),
    "parts": ({"role": "tool", "content": [{"type": "text", "text": "3"}]}, "3"),
    "nothing": ({"role": "tool", "content": ""}, ""),
}


@pytest.mark.parametrize("case", RESULTS)
def test_results_of_every_format_become_turns_of_a_tool(case: str) -> None:
    turn, shown = RESULTS[case]
    record = conversation({"messages": [ASKED, {"role": "assistant", "tool_calls": [NAMED]}, turn, END[1]]})
    assert record.messages[2]["role"] == "tool"
    assert f"<tool_response>{shown}" in rendered(record, WRAPPED)
    assert {"name", "tool_call_id"} & turn.keys() == record.messages[2].keys() - {"role", "content"}


def test_several_results_in_one_turn_of_hermes_are_several_turns() -> None:
    value = "<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response>"
    turns = [{"from": "human", "value": "x"}, {"from": "tool", "value": value}, {"from": "gpt", "value": "y"}]
    assert [message["content"] for message in conversation({"conversations": turns}).messages] == ["x", "a", "b", "y"]


def test_a_turn_that_sharegpt_cuts_up_is_one_turn_again() -> None:
    turns = [
        {"from": "human", "value": "1+2?"},
        {"from": "gpt", "value": "I add.", "thinking": "hm"},
        {"from": "function_call", "value": json.dumps(SUM)},
        {"from": "function_call", "value": json.dumps(SUM), "name": "again"},
        {"from": "observation", "value": "3"},
        {"from": "function_call", "value": json.dumps(SUM), "weight": 0},
        {"from": "function_call", "value": json.dumps(SUM)},
    ]
    record = conversation({"conversations": turns})
    assert record.messages == [
        ASKED,
        {"role": "assistant", "content": "I add.", "thinking": "hm", "name": "again", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "3"},
        *[{"role": "assistant", "content": "", "tool_calls": [CALL]}] * 2,
    ]
    assert record.untrained == {3}, "turns of which one is trained stay apart"


def test_text_and_calls_of_one_message_stay_together() -> None:
    record = conversation({"messages": [ASKED, {"role": "assistant", "content": "I add.", "tool_calls": [AS_TEXT]}]})
    assert rendered(record, WRAPPED).endswith(f"I add.{SHOWN[WRAPPED].split('<|assistant|>')[1].split('<|user|>')[0]}")


@pytest.mark.parametrize(
    ("given", "read"), [("", {}), ("{}", {}), ("x=1", "x=1"), ("[1]", [1]), ('{"a": null}', {"a": None})]
)
def test_arguments_that_are_no_object_stay_what_they_are(given: str, read: Any) -> None:
    call = {"function": {"name": "sum", "arguments": given}}
    record = conversation({"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}]})
    assert record.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "sum", "arguments": read}}]


PARAMETERS = {"type": "object", "properties": {"x": {"type": "number"}}}
BARE = {"name": "sum", "description": "Adds.", "parameters": PARAMETERS}
DEFINITION = {"type": "function", "function": BARE}
TOOLS: dict[str, Any] = {
    "OpenAI": [DEFINITION],
    "text": json.dumps([DEFINITION]),
    "bare": [BARE],
    "bare text": json.dumps([BARE]),
    "list of texts": [json.dumps(BARE)],
    "one": BARE,
    "flat": [{"type": "function", **BARE}],
    "parameters as text": [{"type": "function", "function": {**BARE, "parameters": json.dumps(PARAMETERS)}}],
    "gaps of Arrow": [{"type": "function", "function": {**BARE, "parameters": {**PARAMETERS, "y": None}}, "z": None}],
}


@pytest.mark.parametrize("case", TOOLS)
@pytest.mark.parametrize("column", ["tools", "functions"])
@pytest.mark.parametrize("beside", [{"messages": [ASKED, END[1]]}, {"question": "1+2?", "answer": "Three."}])
def test_definitions_of_every_format_are_given_to_the_template(case: str, column: str, beside: dict[str, Any]) -> None:
    record = conversation({column: TOOLS[case], **beside})
    assert record.variables == {"tools": [DEFINITION]}
    assert record.unused == frozenset()
    assert rendered(record).startswith(f'tools=[{{"type": "function", "function": {json.dumps(BARE)}}}]')


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_are_no_variable(tools: Any) -> None:
    assert conversation({"question": "a", "answer": "b", "tools": tools}).variables == {}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "sum(x)"}, "row 0: 'tools' must be a list of objects, or its JSON text, got 'sum(x)' (str)"),
        ({"tools": [5]}, "row 0: 'tools' must be a list of objects"),
        (
            {"messages": [{"from": "function_call", "value": "sum(x)"}]},
            "messages[0]: 'value' must be a list of objects, or its JSON text, got 'sum(x)' (str)",
        ),
        ({"messages": [{"from": "function_call"}]}, "messages[0]: no 'content'; it has 'from'."),
        ({"messages": [{"role": "tool", "result": "3"}]}, "messages[0]: no 'content'; it has 'role', 'result'."),
        ({"messages": [{"role": "tool", "content": None}]}, "messages[0]: 'content' must be text, got None"),
    ],
)
def test_what_is_no_tool_is_named(columns: dict[str, Any], message: str) -> None:
    row = {"messages": [ASKED, END[1]], **columns}
    with pytest.raises(RowError) as caught:
        conversation(row)
    assert message in str(caught.value)
    assert "sum(x)" not in caught.value.kind


def test_calls_are_trained_and_results_are_not(write: Write) -> None:
    template = WRAPPED + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    rows = [{"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [AS_TEXT]}, *END]}]
    data = SFTDataModule(write("a.jsonl", rows), tokenizer=(tokenizer := tiny_tokenizer(template)))
    data.setup()
    row = data.rows["train"][0]
    trained = [token for token, used in zip(row["input_ids"], row["supervised"], strict=True) if used]
    assert tokenizer.decode(trained) == ('<tool_call>sum {"x": 1, "y": [2, null]}</tool_call><|end|>Three.<|end|>')
