"""Long conversations: their cost grows with the number of turns, not with its square."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_lora.data.chat import long, template
from tests.data.chat.templates import ALTERNATE, CALL, FAMILIES, assistant, build, user
from tests.data.chat.test_table import encoded, trained
from tests.support.tiny_tokenizer import tiny_tokenizer


def chat(turns: int, tools: bool = False) -> list[dict[str, Any]]:
    messages = []
    for number in range(turns):
        messages.append(user(f"question {number}?"))
        if tools:
            messages += [assistant(None, tool_calls=[CALL]), {"role": "tool", "content": f"cold {number}"}]
        messages.append(assistant(f"answer {number}."))
    return messages


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each text that is rendered from now on."""
    lengths: list[int] = []
    render = template.render_jinja_template

    def counted(*args: Any, **options: Any) -> Any:
        result: Any = render(*args, **options)
        lengths.append(len(result[0][0]))
        return result

    monkeypatch.setattr(template, "render_jinja_template", counted)
    return lengths


LINEAR = ["plain", "date in the header", "tool results as a role of their own", "header inside the marks"]
LINEAR += ["no header in the prompt", "closing token after the conversation", "system merged into the first question"]


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", [*LINEAR, "looks at the last one", "alternation"])
def test_cost_is_linear_in_the_number_of_turns(name: str, tools: bool, rendered: list[int]) -> None:
    known = {
        "looks at the last one": build(each="{% if loop.last %}{% endif %}"),
        "alternation": build(start=ALTERNATE),
    }
    tokenizer = tiny_tokenizer(known[name]) if name in known else FAMILIES[name].tokenizer()
    if name == "alternation" and tools:
        return
    cost = {}
    for turns in (10, 100):
        rendered.clear()
        (row,) = encoded(tokenizer, chat(turns, tools))
        cost[turns] = sum(rendered)
        answers = [text.partition("<|end|>")[0] for text in trained(tokenizer, row)]
        assert answers == [text for n in range(turns) for text in (["[weather]"] if tools else []) + [f"answer {n}."]]
    assert cost[100] <= 15 * cost[10], cost


@pytest.mark.parametrize("name", FAMILIES)
def test_long_conversations_read_as_if_each_answer_were_rendered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, tokenizer = FAMILIES[name], FAMILIES[name].tokenizer()
    messages = family.messages(chat(6, tools=family.tools is not None))
    quick = encoded(tokenizer, messages)
    monkeypatch.setattr(long, "FEW", 1000)
    slow = encoded(tokenizer, messages)
    assert [(row.ids.tolist(), row.supervised.tolist()) for row in quick] == [
        (row.ids.tolist(), row.supervised.tolist()) for row in slow
    ]


def test_one_turn_is_rendered_twice(rendered: list[int]) -> None:
    tokenizer = FAMILIES["plain"].tokenizer()
    encoded(tokenizer, chat(1))
    start = len(rendered)
    rendered.clear()
    encoded(tokenizer, [*chat(1), user("and?"), assistant("so.")])
    assert (start, len(rendered)) == (start, start + 2)


@pytest.mark.parametrize(
    "odd",
    [
        assistant("a <|end|> inside"),
        assistant("a <|assistant|>\n inside"),
        assistant("hm</think>so"),
        assistant("with", reasoning_content="thinking"),
        assistant("with", tool_calls=[CALL]),
    ],
)
def test_one_odd_answer_among_many_is_found_in_its_place(odd: dict[str, Any]) -> None:
    tokenizer = FAMILIES["plain"].tokenizer()
    messages = [*chat(5), user("odd?"), odd, *chat(5)]
    (row,) = encoded(tokenizer, messages)
    texts = trained(tokenizer, row)
    assert texts[:5] == texts[6:] == [f"answer {number}.<|end|>" for number in range(5)]
    assert texts[5].endswith("<|end|>")
    assert (odd["content"] or "") in texts[5]


def test_one_answer_that_a_template_rewrites_makes_one_row_for_each() -> None:
    tokenizer = tiny_tokenizer(
        build("<|assistant|>\n{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|end|>")
    )
    messages = [*chat(5), user("odd?"), assistant("<think>hm</think>so"), *chat(5)]
    rows = encoded(tokenizer, messages)
    assert [trained(tokenizer, row) for row in rows][5] == ["<think>hm</think>so<|end|>"]
    assert len(rows) == 11
