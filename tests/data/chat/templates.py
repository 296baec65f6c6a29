"""Small chat templates that behave like those of known model families, and what each trains, written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.support.tiny_tokenizer import tiny_tokenizer

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


SITUATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("a?"), assistant("b.")],
    "system": [{"role": "system", "content": "Rhyme."}, user("a?"), assistant("b.")],
    "two turns": [user("a?"), assistant("b."), user("c?"), assistant("d.")],
    "thinking": [
        user("a?"),
        assistant("b.", reasoning_content="one"),
        user("c?"),
        assistant("d.", reasoning_content="two"),
    ],
    "tools": [user("a?"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "cold"}, assistant("d.")],
}
"""The conversations of the table; the last one has tools."""

HEAD, END = "<|assistant|>\n", "<|end|>\n"
THINKING = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
BODY = "{{ m.content or '' }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}"
ANSWER = HEAD + THINKING + BODY + END
OTHER = "<|{{ 'user' if m.role == 'tool' else m.role }}|>\n{{ m.content }}" + END
OFFER = "{% if tools %}<|system|>\n{{ tools | tojson }}" + END + "{% endif %}"
MARK, UNMARK = "{% generation %}", "{% endgeneration %}"


def build(
    answer: str = ANSWER, other: str = OTHER, start: str = OFFER, prompt: str = HEAD, close: str = "", each: str = ""
) -> str:
    """A template of the usual form: something first, one part for each message, something last."""
    return (
        f"{start}{{% for m in messages %}}{each}{{% if m.role == 'assistant' %}}{answer}{{% else %}}{other}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% else %}}{close}{{% endif %}}"
    )


Rows = list[list[str]]
"""The trained texts of each row that a conversation becomes."""


@dataclass(frozen=True)
class Family:
    """A template and the trained texts of each of the `SITUATIONS`; None where the template refuses it.

    Args:
        template: The template.
        one: Rows of one turn, and of one with a system prompt.
        two: Rows of two turns.
        thinking: Rows of two turns with thinking.
        tools: Rows of a call, its result and an answer.
        end: Text with which every trained text ends.
        opened: Whether the content of each answer begins with ``<think>\\nhm\\n</think>``.
    """

    template: str
    one: Rows
    two: Rows
    thinking: Rows
    tools: Rows | None
    end: str = "<|end|>"
    opened: bool = False

    def rows(self, situation: str) -> Rows | None:
        known = {"one turn": self.one, "system": self.one, "two turns": self.two, "thinking": self.thinking}
        return known.get(situation, self.tools)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = tiny_tokenizer(self.template)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|return|>", "<|tool|>"]})
        return tokenizer

    def messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not self.opened:
            return messages
        hm = "<think>\nhm\n</think>"
        return [m if m["role"] != "assistant" else {**m, "content": hm + (m["content"] or "")} for m in messages]


ONE = [["b.<|end|>"]]
TWO = [["b.<|end|>", "d.<|end|>"]]
THOUGHT = [["<think>one</think>b.<|end|>", "<think>two</think>d.<|end|>"]]
CALLED = [["[weather]<|end|>", "d.<|end|>"]]


def apart(rows: Rows) -> Rows:
    """The same trained texts, each in a row of its own."""
    return [[text] for row in rows for text in row]


def usual(template: str) -> Family:
    return Family(template, ONE, TWO, THOUGHT, CALLED)


LAST_QUESTION = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == (messages[0].role == 'system')) and "
    "m.role != 'system' %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
MERGED = (
    "{% if m.role == 'user' %}<|user|>\n{% if loop.index0 == 1 and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}"
    + END
    + "{% elif m.role == 'tool' %}"
    + OTHER
    + "{% endif %}"
)

FAMILIES: dict[str, Family] = {
    "plain": usual(build()),
    "default system prompt": usual(
        build(start=OFFER + "{% if messages[0].role != 'system' %}<|system|>\nHelp.<|end|>\n{% endif %}")
    ),
    "date in the header": usual(build(start=OFFER + "<|system|>\n{{ strftime_now('%d %b %Y') }}" + END)),
    "thinking stripped from earlier turns": Family(
        build(HEAD + "{% if loop.index0 > ns.last %}" + THINKING + "{% endif %}" + BODY + END, start=LAST_QUESTION),
        ONE,
        TWO,
        apart(THOUGHT),
        CALLED,
    ),
    "thinking in the last turn only": Family(
        build(HEAD + "{% if loop.last %}<think></think>{% endif %}" + BODY + END),
        [["<think></think>b.<|end|>"]],
        [["<think></think>b.<|end|>"], ["<think></think>d.<|end|>"]],
        [["<think></think>b.<|end|>"], ["<think></think>d.<|end|>"]],
        [["<think></think>[weather]<|end|>"], ["<think></think>d.<|end|>"]],
    ),
    "thinking opened by the prompt": Family(
        build(
            "<|assistant|>" + BODY.replace("m.content or ''", "(m.content or '').split('</think>')[-1]") + END,
            prompt="<|assistant|><think>\n",
        ),
        [["hm\n</think>b.<|end|>"]],
        [["hm\n</think>b.<|end|>"], ["hm\n</think>d.<|end|>"]],
        [["hm\n</think>b.<|end|>"], ["hm\n</think>d.<|end|>"]],
        [["hm\n</think>[weather]<|end|>"], ["hm\n</think>d.<|end|>"]],
        opened=True,
    ),
    "no thinking, closed by the prompt": Family(
        build(HEAD + "<think>\n\n</think>\n\n" + BODY + END, prompt=HEAD + "<think>\n\n</think>\n\n"),
        ONE,
        TWO,
        TWO,
        CALLED,
    ),
    "tool results as a role of their own": usual(build(other=OTHER.replace("'user' if m.role == 'tool' else ", ""))),
    "tools in the system prompt": usual(
        build(
            start="{% if tools or messages[0].role == 'system' %}<|system|>\n{{ messages[0].content if "
            "messages[0].role == 'system' else '' }}{{ tools | tojson if tools else '' }}<|end|>\n{% endif %}",
            other="{% if m.role != 'system' %}" + OTHER + "{% endif %}",
        )
    ),
    "no end token": Family(
        build(HEAD + BODY, OTHER.replace(END, "")), [["b."]], [["b.", "d."]], [["b.", "d."]], [["[weather]", "d."]], ""
    ),
    "end token between turns only": Family(
        build(ANSWER.replace(END, "{% if not loop.last %}<|end|>\n{% endif %}")),
        [["b."]],
        [["b.<|end|>", "d."]],
        [["<think>one</think>b.<|end|>", "<think>two</think>d."]],
        [["[weather]<|end|>", "d."]],
        "",
    ),
    "closing token after the conversation": Family(
        build(close="<|start|>"),
        [["b.<|end|>\n<|start|>"]],
        [["b.<|end|>", "d.<|end|>\n<|start|>"]],
        [["<think>one</think>b.<|end|>", "<think>two</think>d.<|end|>\n<|start|>"]],
        [["[weather]<|end|>", "d.<|end|>\n<|start|>"]],
        "",
    ),
    "other end token in the last turn": Family(
        build(HEAD + THINKING + BODY + "{{ '<|return|>' if loop.last else '<|end|>\n' }}"),
        [["b.<|return|>"]],
        [["b.<|return|>"], ["d.<|return|>"]],
        [["<think>one</think>b.<|return|>"], ["<think>two</think>d.<|return|>"]],
        [["[weather]<|return|>"], ["d.<|return|>"]],
        "<|return|>",
    ),
    "header inside the marks": usual(build(MARK + ANSWER + UNMARK)),
    "marks without the end": usual(build(HEAD + MARK + THINKING + BODY + UNMARK + END)),
    "line break inside the marks": usual(build(HEAD + MARK + THINKING + BODY + END + UNMARK)),
    "one mark for each part": usual(build(HEAD + MARK + THINKING + UNMARK + MARK + BODY + UNMARK + END)),
    "system merged into the first question": usual(build(other=MERGED)),
    "begin token": usual(build(start="{{ bos_token }}" + OFFER)),
    "alternation enforced": Family(build(start=ALTERNATE), ONE, TWO, THOUGHT, None),
    "no header in the prompt": usual(
        build(
            ANSWER.replace(HEAD, ""),
            OTHER.replace(END, "<|end|>{{ '<|assistant|>' if m.role != 'system' }}"),
            prompt="",
        )
    ),
    "number of messages before each": Family(
        build(each="{{ messages | length }}"), ONE, apart(TWO), apart(THOUGHT), apart(CALLED)
    ),
}
