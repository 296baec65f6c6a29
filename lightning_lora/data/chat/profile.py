"""A chat template and all that is known of it before the first row: how answers end, what is told once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_lora.data.chat.endings import added_tokens, any_of, end_tokens, prompt_end, special_tokens
from lightning_lora.data.chat.names import Names
from lightning_lora.data.chat.template import Template, find_template
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import ChatTemplateError, did_you_mean

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE = "the chat template writes the date, today {day}; chat_template_kwargs: {{date: {day}}} keeps it"
NO_END = "no token of {template} ends an answer, so the model does not learn to stop; end_of_answer: {token!r} puts one"
NEEDLESS_END = "end_of_answer is not used where {template} itself ends answers with {tokens}"
NEEDLESS_SEPARATOR = "prompt_separator is not used where {template} renders prompts"


@dataclass(frozen=True)
class Profile:
    """What is known of a chat template.

    Args:
        template: The template, with the variables that all rows share.
        ends: Tokens with which answers end.
        added: Tokens that the tokenizer never splits, the longest first.
        special: The tokens among them that are special.
        pattern: Finds each of ``ends``.
        typed: Finds each of ``special``.
        prompt_end: What the template writes after the last message of a prompt.
        marked: Whether it has ``{% generation %}`` marks.
        closes: Whether a token is put after answers that end with none.
        no_end: What is told about rows with an answer that ends with no token.
        notes: What is told about every row.
    """

    template: Template
    ends: tuple[str, ...]
    added: tuple[str, ...]
    special: frozenset[str]
    pattern: re.Pattern[str]
    typed: re.Pattern[str]
    prompt_end: str
    marked: bool
    closes: bool
    no_end: str
    notes: frozenset[str]

    @property
    def names(self) -> Names:
        """What the template reads."""
        return self.template.names


def find_profile(tokenizer: PreTrainedTokenizerBase, settings: RowSettings, tools: bool = False) -> Profile | None:
    """The profile of the chat template of a run, or None without a template.

    Args:
        tokenizer: A fast tokenizer.
        settings: How rows become tokens.
        tools: Whether it is for conversations with tools.

    Raises:
        ConfigError: If there is no such template, or if it cannot be read.
    """
    text = find_template(tokenizer, settings.chat_template, tools)
    if text is None:
        return None
    variables = {**tokenizer.special_tokens_map, **settings.chat_template_kwargs}
    template = Template(text, today=settings.today).with_variables(variables)
    ends, special = end_tokens(tokenizer, template), special_tokens(tokenizer)
    named = _named(settings.chat_template)
    return Profile(
        template,
        ends,
        added_tokens(tokenizer),
        frozenset(special),
        any_of(ends),
        any_of(special),
        prompt_end(template),
        _MARKS.search(text) is not None,
        settings.end_of_answer is not None,
        NO_END.format(template=named, token=tokenizer.eos_token or "<|end|>"),
        frozenset(_notes(template, settings, ends, named)),
    )


def end_of_answer_id(tokenizer: PreTrainedTokenizerBase, settings: RowSettings) -> int | None:
    """The id of the token that is put after answers without an end, or None.

    Raises:
        ConfigError: If ``end_of_answer`` is not exactly one token.
    """
    if settings.end_of_answer is None:
        return None
    ids: Any = tokenizer(settings.end_of_answer, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        known = special_tokens(tokenizer)
        raise ChatTemplateError(
            f"end_of_answer must be the text of one token, got {settings.end_of_answer!r} ({len(ids)} tokens)"
            f"{did_you_mean(settings.end_of_answer, known)} Special tokens are {', '.join(known[:10])}."
        )
    return int(ids[0])


def _notes(template: Template, settings: RowSettings, ends: tuple[str, ...], named: str) -> Iterator[str]:
    names = template.names
    given: Mapping[str, Any] = settings.chat_template_kwargs
    for name in given:
        if name not in names.variables and not (name == "date" and names.date):
            yield f"chat_template_kwargs: {named} does not read {name!r}{did_you_mean(name, names.variables)}"
    if names.date and "date" not in given:
        yield DATE.format(day=settings.today.isoformat())
    if settings.prompt_separator != RowSettings.prompt_separator:
        yield NEEDLESS_SEPARATOR.format(template=named)
    if settings.end_of_answer is not None and ends:
        yield NEEDLESS_END.format(template=named, tokens=" or ".join(map(repr, ends)))


def _named(given: str | None) -> str:
    if given is None:
        return "the tokenizer's chat template"
    return "the given chat template" if "{" in given else f"chat template {given!r}"
