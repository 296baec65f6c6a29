"""The settings of chat templates: which one, its variables, its date, the token after answers without an end."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.chat.endings import end_of_turn_ids
from lightning_lora.data.chat.names import REASONING, as_read, read_names
from lightning_lora.data.chat.template import find_template, template_identity
from lightning_lora.data.encoding import Encoded, encode
from lightning_lora.data.records import Conversation
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import ConfigError
from tests.data.chat.templates import BODY, END, FAMILIES, HEAD, MARK, SITUATIONS, UNMARK, build
from tests.data.chat.test_table import encoded, trained
from tests.data.conftest import Write
from tests.support.tiny_tokenizer import tiny_tokenizer

TWO = SITUATIONS["two turns"]
DATED = FAMILIES["date in the header"]


def texts(tokenizer: PreTrainedTokenizerFast, rows: list[Encoded]) -> list[str]:
    return [str(tokenizer.decode(row.ids)) for row in rows]


def notes(rows: list[Encoded]) -> str:
    return "\n".join(sorted(set().union(*(row.notes for row in rows))))


def test_a_template_is_a_name_a_file_or_a_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"short": "{{ messages }}", "rag": "{{ documents }}"}
    (tmp_path / "mine.jinja").write_text("mine {{ messages }}")
    assert find_template(tokenizer, "rag") == "{{ documents }}"
    assert find_template(tokenizer, str(tmp_path / "mine.jinja")) == "mine {{ messages }}"
    assert find_template(tokenizer, "{% if messages %}a{% endif %}") == "{% if messages %}a{% endif %}"
    with pytest.raises(ConfigError, match=r"several chat templates and none is its default.*\['rag', 'short'\]"):
        find_template(tokenizer)
    with pytest.raises(ConfigError, match=r"'shrt' is not a file .*did you mean 'short'\? The tokenizer's templates"):
        find_template(tokenizer, "shrt")


def test_conversations_with_tools_take_the_template_for_tools_as_in_transformers() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": build(), "tool_use": build(start="with tools\n")}
    for name in ("two turns", "tools"):
        (text,) = texts(tokenizer, encoded(tokenizer, SITUATIONS[name]))
        assert text.startswith("with tools") == (name == "tools")


@pytest.mark.parametrize("text", ["{% for m in messages %}", "\n\n{{ messages | nothing }}"])
def test_a_template_that_cannot_be_read_is_named_with_its_line(text: str) -> None:
    line = 1 + text.count("\n")
    with pytest.raises(ConfigError, match=rf"the chat template has an error in line {line}: "):
        encoded(tiny_tokenizer(), TWO, chat_template=text)


def test_variables_reach_the_template_and_unknown_ones_are_told() -> None:
    tokenizer = tiny_tokenizer(build(start="{% if enable_thinking %}on{% endif %}"))
    rows = encoded(tokenizer, TWO, chat_template_kwargs={"enable_thinking": True})
    assert texts(tokenizer, rows)[0].startswith("on")
    assert not notes(rows)
    rows = encoded(tokenizer, TWO, chat_template_kwargs={"enable_thinkin": True})
    assert "does not read 'enable_thinkin'; did you mean 'enable_thinking'?" in notes(rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": []}, r"cannot set \['messages'\], which rendering"),
        ({"date": "yesterday"}, r"must be a day like 2026-11-26, got 'yesterday'"),
        ({"x": object()}, r"texts, numbers, lists and mappings only"),
        ([1], r"must map names to values, got \[1\]"),
        ({1: 2}, r"must map names to values"),
    ],
)
def test_variables_that_are_none_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SFTDataModule("a.jsonl", chat_template_kwargs=given)


def test_a_row_may_set_variables_of_its_own_and_what_nothing_reads_is_named() -> None:
    tokenizer = tiny_tokenizer(build(start="{{ mood }}{{ strftime_now('%Y') }}"))
    messages = [{**message, "name": "Ann", "weather": None} for message in TWO]
    record = Conversation("here", messages, variables={"mood": "happy", "documents": [], "date": "1999-12-31"})
    (rows,) = encode(tokenizer, [record], RowSettings(99, chat_template_kwargs={"mood": "sad", "date": "2026-11-26"}))
    assert isinstance(rows, list)
    assert texts(tokenizer, rows)[0].startswith("happy1999<|user|>")
    assert rows[0].unused == {"name", "documents"}
    for variables in ({"messages": []}, {"date": "soon"}):
        (error,) = encode(tokenizer, [replace(record, variables=variables)], RowSettings(99))
        assert isinstance(error, RowError)
        assert error.kind == "variables for the chat template that cannot be used: "


@pytest.mark.parametrize("day", ["2026-11-26", date(2026, 11, 26)])
def test_a_given_date_is_what_the_template_writes_as_today(day: Any) -> None:
    tokenizer = DATED.tokenizer()
    rows = encoded(tokenizer, TWO, chat_template_kwargs={"date": day})
    assert texts(tokenizer, rows)[0].startswith("<|system|>\n26 Nov 2026<|end|>")
    assert not notes(rows)
    again: Any = tokenizer.apply_chat_template(TWO, tokenize=False)
    assert again.startswith(f"<|system|>\n{date.today().strftime('%d %b %Y')}"), "the clock is put back"


def test_without_a_given_date_today_is_written_told_and_in_the_identity() -> None:
    tokenizer, today = DATED.tokenizer(), date.today()
    rows = encoded(tokenizer, TWO)
    assert texts(tokenizer, rows)[0].startswith(f"<|system|>\n{today.strftime('%d %b %Y')}<|end|>")
    assert f"the chat template writes the date, today {today.isoformat()}" in notes(rows)
    open_, pinned = RowSettings(99), RowSettings(99, chat_template_kwargs={"date": "2026-11-26"})
    tomorrow = today + timedelta(days=1)
    assert template_identity(tokenizer, open_) != template_identity(tokenizer, replace(open_, today=tomorrow))
    assert template_identity(tokenizer, pinned) == template_identity(tokenizer, replace(pinned, today=tomorrow))
    plain = FAMILIES["plain"].tokenizer()
    assert template_identity(plain, open_) == template_identity(plain, replace(open_, today=tomorrow))
    assert open_.identity() == replace(open_, today=tomorrow).identity()


@pytest.mark.filterwarnings("ignore:.*writes the date")
def test_tokens_of_another_day_are_made_anew(write: Write) -> None:
    path, tokenizer = write("a.jsonl", [{"question": "a?", "answer": "b."}]), DATED.tokenizer()
    for day in (date(2026, 11, 26), date(2026, 11, 27)):
        data = SFTDataModule(path, tokenizer=tokenizer)
        data.settings = replace(data.settings, today=day)
        data.setup()
        assert day.strftime("%d %b") in tokenizer.decode(data.rows["train"][0]["input_ids"])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("no end token", [["b.<|return|>"], ["d.<|return|>"]]),
        ("end token between turns only", [["b.<|end|>", "d.<|return|>"]]),
        ("plain", [["b.<|end|>", "d.<|end|>"]]),
    ],
)
def test_an_end_is_put_after_answers_without_one(name: str, wanted: list[list[str]]) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    rows = encoded(tokenizer, TWO, end_of_answer="<|return|>")
    assert [trained(tokenizer, row) for row in rows] == wanted
    assert ("end_of_answer is not used where" in notes(rows)) == (name != "no end token")
    assert "does not learn to stop" not in notes(rows)


@pytest.mark.parametrize("name", ["no end token", "end token between turns only"])
def test_answers_without_an_end_are_told(name: str) -> None:
    rows = encoded(FAMILIES[name].tokenizer(), TWO)
    assert "no token of the tokenizer's chat template ends an answer" in notes(rows)
    assert "end_of_answer: '<|end|>' puts one" in notes(rows)


def test_an_end_that_is_not_one_token_is_refused() -> None:
    for text in ("<|ended|>", ""):
        with pytest.raises(ConfigError, match=r"end_of_answer must be the text of one token, got"):
            encoded(FAMILIES["no end token"].tokenizer(), TWO, end_of_answer=text)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("plain", ["<|end|>"]),
        ("no end token", []),
        ("end token between turns only", ["<|end|>"]),
        ("closing token after the conversation", ["<|end|>", "<|start|>"]),
        ("other end token in the last turn", ["<|return|>"]),
        ("marks without the end", ["<|end|>"]),
        ("alternation enforced", ["<|end|>"]),
        ("no header in the prompt", ["<|end|>"]),
    ],
)
def test_generation_stops_at_the_tokens_that_end_answers(name: str, wanted: list[str]) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    assert tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer)) == wanted
    assert tokenizer.convert_ids_to_tokens(end_of_turn_ids(tiny_tokenizer(None))) == ["<|end|>"]


def test_marks_that_leave_text_out_are_kept_and_told() -> None:
    tokenizer = tiny_tokenizer(build(HEAD + "<think>{{ m.reasoning_content }}</think>" + MARK + BODY + UNMARK + END))
    rows = encoded(tokenizer, SITUATIONS["thinking"])
    assert [trained(tokenizer, row) for row in rows] == [["b.<|end|>", "d.<|end|>"]]
    assert "marks of the chat template leave out text" in notes(rows)
    for name in ("header inside the marks", "marks without the end", "line break inside the marks"):
        assert not notes(encoded(FAMILIES[name].tokenizer(), TWO)), "a header, an end, a line break are put right"


def test_marks_tell_the_answer_where_the_prompt_does_not() -> None:
    answer = "<|assistant|>" + MARK + BODY + END + UNMARK
    tokenizer = tiny_tokenizer(build(answer, prompt="<|assistant|><think>"))
    rows = encoded(tokenizer, TWO)
    assert [trained(tokenizer, row) for row in rows] == [["b.<|end|>", "d.<|end|>"]]
    assert "after another prompt than it is given later" in notes(rows)


@pytest.mark.parametrize(
    ("template", "keys", "variables", "words"),
    [
        ("{% for m in messages %}{{ m.a }}{{ m['b'] }}{{ m.get('c') }}{% endfor %}{{ x }}", "abc", "x", ()),
        ("{% for m in messages %}{% if 'a' in m and '</b>' in m.c %}{% endif %}{% endfor %}", "ac", "", ("</b>", "a")),
        ("{% set rest = messages[1:] %}{% for m in rest %}{% set n = m %}{{ n.a }}{% endfor %}", "a", "", ()),
        ("{{ messages[0].a }}{{ messages | length }}{{ (messages | last).b }}", "ab", "", ()),
        ("{% for m in messages %}{{ m | tojson }}{% endfor %}", None, "", ()),
        ("{% for m in messages %}{% for k, v in m.items() %}{{ k }}{% endfor %}{% endfor %}", None, "", ()),
        ("{{ messages }}", None, "", ()),
        ("{% macro show(m) %}{{ m.a }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}", None, "", ()),
        ("{% for m in messages %}{{ m.tools.x }}{% for t in tools %}{{ t.z }}{% endfor %}{% endfor %}", ["tools"],
         ["tools"], ()),
    ],
)  # fmt: skip
def test_what_a_template_reads_is_found_in_its_syntax(
    template: str, keys: Any, variables: Any, words: tuple[str, ...]
) -> None:
    names = read_names(template)
    assert names.keys == (None if keys is None else frozenset(keys))
    assert names.variables - {"messages"} == frozenset(variables)
    assert set(words) <= set(names.words)


def test_reasoning_is_read_under_any_of_its_names() -> None:
    tokenizer = FAMILIES["plain"].tokenizer()
    messages = [{**message, "thinking": "hm"} if message["role"] == "assistant" else message for message in TWO]
    rows = encoded(tokenizer, messages)
    assert trained(tokenizer, rows[0]) == ["<think>hm</think>b.<|end|>", "<think>hm</think>d.<|end|>"]
    assert not rows[0].unused


@pytest.mark.parametrize("name", REASONING)
def test_a_template_finds_reasoning_under_both_names_that_templates_read(name: str) -> None:
    """Also with versions of transformers that do not copy it."""
    message = {"role": "assistant", "content": "b.", "tool_calls": None, name: "hm"}
    given = {key: value for key, value in message.items() if value is not None}
    assert as_read(message) == {**given, "thinking": "hm", "reasoning_content": "hm"}
    assert as_read(message | {name: None}) == {"role": "assistant", "content": "b."}


def test_conversations_that_become_several_rows_are_told_from_the_cache_too(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer(FAMILIES["thinking in the last turn only"].template)
    path = write("a.jsonl", [{"messages": TWO}] * 3)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO"):
            SFTDataModule(path, tokenizer=tokenizer).setup("fit")
        assert f"{path}: 3 conversations became 6 rows, one for each answer" in caplog.text
