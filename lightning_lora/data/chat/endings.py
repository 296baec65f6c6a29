"""The token that ends an answer under a chat template, found out by rendering small conversations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_lora.data.chat.template import Template, find_template
from lightning_lora.errors import ConfigError

QUESTION, ANSWER, REPLY, TOOL = "question38", "answer38", "reply38", "tool38"
"""Words of the small conversations that no template writes itself."""


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> list[int]:
    """The tokens with which answers end under a chat template, that of a plain answer first; empty if none does.

    A model that has learned its answers under this template is to stop at any of these tokens.

    Args:
        tokenizer: The tokenizer.
        template: The text of the template; None takes the tokenizer's own. A tokenizer without a template ends answers
            with its end token.
    """
    text = template or find_template(tokenizer)
    if text is None:
        return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]  # type: ignore[arg-type]
    names = end_tokens(tokenizer, Template(text, tokenizer.special_tokens_map))
    return [int(i) for i in tokenizer.convert_tokens_to_ids(list(names))]  # type: ignore[arg-type,union-attr]


def end_tokens(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[str, ...]:
    """The tokens with which answers end, in the order in which they are written, without repetition."""
    found = _after_answer(tokenizer, template) or _between_turns(tokenizer, template)
    return tuple(dict.fromkeys([*found, *_after_call(tokenizer, template)]))


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Tokens that the tokenizer never splits, such as ``<|end|>``, the longest first; no white space."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    return tuple(sorted(names, key=len, reverse=True))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The `added_tokens` that are special."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(name for name in added_tokens(tokenizer) if name in special)


def any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds each of some tokens in a text, and nothing if there are none."""
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def prompt_end(template: Template) -> str:
    """What a template writes after a question that is the last message of a prompt."""
    text = _try(template, [_user(QUESTION)], prompt=True)
    return text.rpartition(QUESTION)[2] if QUESTION in text else ""


def common_prefix(first: str, second: str) -> str:
    """The longest text with which both texts begin."""
    if second.startswith(first):
        return first
    return first[: next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))]


def _after_answer(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[str]:
    text = _try(template, [_user(QUESTION), _assistant(ANSWER)])
    found = any_of(added_tokens(tokenizer)).findall(text.rpartition(ANSWER)[2]) if ANSWER in text else []
    special = special_tokens(tokenizer)
    return [token for token in found if token in special] or found


def _between_turns(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[str]:
    """The token between an answer and the next question that does not belong to the header of that question."""
    text = _try(template, [_user(QUESTION), _assistant(ANSWER), _user(REPLY), _assistant("")])
    if not (QUESTION in text and ANSWER in text and REPLY in text):
        return []
    before = text.partition(QUESTION)[0]
    between = text.partition(ANSWER)[2].partition(REPLY)[0]
    header = common_prefix(before[::-1], between[::-1])
    first = any_of(added_tokens(tokenizer)).search(between)
    if first is None or (first.end() > len(between) - len(header) and first[0] != tokenizer.eos_token):
        return []
    return [first[0]]


def _after_call(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[str]:
    call = {"type": "function", "function": {"name": TOOL, "arguments": {}}}
    text = _try(template, [_user(QUESTION), {**_assistant(""), "tool_calls": [call]}]).rstrip()
    last = [token for token in special_tokens(tokenizer) if text.endswith(token)]
    return last[:1] if TOOL in text else []


def _try(template: Template, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
    # A template may refuse what it is not made for, tools above all; that is an answer.
    try:
        return template.render(messages, prompt)
    except ConfigError:  # it does not end, whatever it is given
        raise
    except (TemplateError, TypeError, ValueError):
        return ""


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}
