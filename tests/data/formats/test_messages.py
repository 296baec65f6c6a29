"""Messages reach the template with all their keys; keys about training set the mask."""

from __future__ import annotations

from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lightning_lora.data import SFTDataModule
from lightning_lora.errors import DataError
from tests.data.conftest import Write
from tests.data.formats.reading import chat, conversation, rendered
from tests.support.tiny_tokenizer import tiny_tokenizer

ASKED = {"role": "user", "content": "1+1?"}


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ({"reasoning_content": "so"}, ["reasoning_content=so "]),
        ({"thinking": "so"}, ["thinking=so "]),
        ({"name": "Ann"}, ["name=Ann "]),
        ({"anything": {"a": [1, None], "b": None}, "more": 0.5}, ['anything={"a": [1, null]} more=0.5 ']),
        ({"reasoning_content": None, "tool_calls": None, "tool_call_id": None}, ["content=2 |"]),
        ({"tool_calls": []}, ["content=2 |"]),
        ({"prefix": False, "empty": ""}, ["prefix=false ", "empty= "]),
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversations", "completion"])
def test_every_key_of_a_message_reaches_the_template(keys: dict[str, Any], shown: list[str], column: str) -> None:
    answer = {"role": "assistant", "content": "2", **keys}
    record = conversation(
        {"prompt": [ASKED], column: [answer]} if column == "completion" else {column: [ASKED, answer]}
    )
    before, after = rendered(record).split("content=1+1? | ")
    assert before == "role=user "
    assert "role=assistant content=2 " in after
    assert all(piece in after for piece in shown)
    assert record.unused == frozenset()


def test_keys_reach_the_template_in_a_training_run(write: Write) -> None:
    rows = [{"messages": [{**ASKED, "name": "Ann"}, {"role": "assistant", "content": "2", "thinking": "so"}]}]
    turns = "<|{{ m.role }}|>{{ m.name }}{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}<|end|>"
    template = "{% for m in messages %}" + turns + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    data = SFTDataModule(write("a.jsonl", rows), tokenizer=(tokenizer := tiny_tokenizer(template)))
    data.setup()
    row = data.rows["train"][0]
    assert tokenizer.decode(row["input_ids"]) == "<|user|>Ann1+1?<|end|><|assistant|>(so)2<|end|>"
    trained = [token for token, used in zip(row["input_ids"], row["supervised"], strict=True) if used]
    assert tokenizer.decode(trained) == "(so)2<|end|>"


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_weight", "loss_mask"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0)])
def test_a_message_can_exclude_itself_from_training(key: str, no: Any, yes: Any) -> None:
    turns = chat(("user", "1+1?"), ("assistant", "3"), ("user", "No."), ("assistant", "2"), ("assistant", "Yes."))
    turns[0][key] = no
    turns[1][key] = no
    turns[3][key] = yes
    turns[4][key] = None
    record = conversation({"messages": turns})
    assert record.untrained == {1}
    assert all(message.keys() == {"role", "content"} for message in record.messages), "these keys are no text"
    assert record.unused == frozenset()
    gpt = [{"from": turn["role"], "value": turn["content"], key: turn.get(key)} for turn in turns]
    assert conversation({"conversations": gpt}) == record


def test_a_user_turn_that_asks_to_be_trained_is_told() -> None:
    turns = [{**ASKED, "train": True}, {"role": "assistant", "content": "2"}]
    assert conversation({"messages": turns}).unused == {"train of user turns"}


def test_only_the_last_answer_is_trained_if_asked() -> None:
    turns = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))
    assert conversation({"messages": turns}, train_on="last answer").untrained == {1}
    turns[3]["weight"] = 0
    assert conversation({"messages": turns}, train_on="last answer").untrained == {1, 3}
    assert conversation({"question": "a", "answer": "b"}, train_on="last answer").untrained == frozenset()


@pytest.mark.parametrize(
    ("role", "read"),
    [
        *[(name, "user") for name in ("user", "human", "User", "prompter")],
        *[(name, "assistant") for name in ("assistant", "gpt", "chatgpt", "bing", "model", "ASSISTANT")],
        *[(name, "system") for name in ("system", "developer")],
        *[(name, "tool") for name in ("tool", "function", "ipython", "observation", "tool_response")],
        ("function_response", "tool"),
    ],
)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_roles_have_many_names_and_four_meanings(role: str, read: str, keys: tuple[str, str], column: str) -> None:
    turns = [{keys[0]: role, keys[1]: "x"}, {keys[0]: "assistant", keys[1]: "y"}]
    messages = conversation({column: turns}).messages
    assert messages == chat((read, "x"), ("assistant", "y"))


def test_parts_of_text_become_one_text() -> None:
    parts = [{"type": "text", "text": "Hi "}, "there", {"type": "input_text", "text": "!", "image_url": None}]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Yo"}]},
    ]
    assert conversation({"messages": turns}).messages == chat(("user", "Hi there!"), ("assistant", "Yo"))


def test_two_messages_of_the_assistant_in_a_row_are_each_trained() -> None:
    record = conversation({"messages": chat(("user", "a"), ("assistant", "b"), ("assistant", "c"))})
    assert record.messages == chat(("user", "a"), ("assistant", "b"), ("assistant", "c"))
    assert record.untrained == frozenset()


def test_an_answer_of_thoughts_alone_is_an_answer() -> None:
    turns = [ASKED, {"role": "assistant", "content": "", "reasoning_content": "hm"}]
    assert rendered(conversation({"messages": turns})).endswith("role=assistant content= reasoning_content=hm |")


def test_a_prompt_in_messages_is_never_trained() -> None:
    prompt = chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    expected = conversation({"messages": [*prompt, *chat(("assistant", "d"))]}, train_on="last answer")
    assert conversation({"prompt": prompt, "completion": chat(("assistant", "d"))}) == expected
    assert conversation({"prompt": prompt, "completion": "d"}) == expected


def test_lists_of_objects_and_objects_of_lists_are_the_same() -> None:
    lists = {"from": ["human", "gpt"], "value": ["a", "b"]}
    assert conversation({"conversations": lists}).messages == chat(("user", "a"), ("assistant", "b"))


def test_gaps_of_parquet_are_not_printed(write: Write, tmp_path: Any) -> None:
    """All objects of a list have the same keys in Arrow; what one does not have is None there."""
    call = {"id": "a", "type": "function", "function": {"name": "sum", "arguments": {"x": 1}}}
    other = {"id": "b", "type": "function", "function": {"name": "find", "arguments": {"city": "Oslo"}}}
    turns = [
        {"role": "user", "content": "Both?"},
        {"role": "assistant", "content": None, "tool_calls": [call, other]},
        {"role": "tool", "content": "1", "tool_call_id": "a"},
        {"role": "assistant", "content": "1", "thinking": "so"},
    ]
    row = {"messages": turns, "tools": [{"type": "function", "function": call["function"]}, {"type": "x"}]}
    parquet.write_table(pyarrow.Table.from_pylist([row, {"messages": turns[:1] + turns[3:]}]), tmp_path / "a.parquet")
    padded, other_row = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert "city" in padded["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert rendered(conversation(padded)) == rendered(conversation(row))
    assert "None" not in rendered(conversation(padded))
    assert "null" not in rendered(conversation(padded))
    assert conversation(other_row) == conversation({"messages": turns[:1] + turns[3:]})


BAD: dict[str, tuple[Any, str, str]] = {
    "weight": ({"weight": 0.5}, "'weight' of a message must be 0, 1, true or false", "got 0.5"),
    "train": ({"train": "yes"}, "'train' of a message must be 0, 1, true or false", "got 'yes'"),
    "both": ({"train": True, "weight": 0}, "its keys contradict each other about training", "'weight': False"),
    "image": ({"content": [{"type": "image_url", "url": "u"}]}, "has a part that is not text", "'image_url'"),
    "number": ({"content": 5}, "'content' must be text", "got 5"),
    "no parts": ({"content": []}, "'content' is empty", "fill it"),
    "calls": ({"tool_calls": "sum"}, "'tool_calls' must be a list of objects, or its JSON text", "got 'sum'"),
    "nameless": ({"tool_calls": [{"function": {"x": 1}}]}, "a call in 'tool_calls' has no 'name'", "'x': 1"),
    "half": ({"thinking": ["\ud83d"]}, "'thinking' has half a character", "at 0"),
    "role": ({"role": "asistant"}, "unknown role", "'asistant'; did you mean 'assistant'?"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_message_is_named_and_its_kind_holds_no_value_of_it(case: str) -> None:
    keys, kind, detail = BAD[case]
    with pytest.raises(DataError) as caught:
        conversation({"messages": [ASKED, {"role": "assistant", "content": "2", **keys}]})
    error: Any = caught.value
    assert error.place == "rows, row 0, messages[1]"
    assert kind in error.kind
    assert detail in str(error)
    assert detail not in error.kind
