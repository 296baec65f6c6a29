"""The chat template of a run: which one it is, what it is given, and what it writes as today's date."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lightning_lora.data.chat.limits import compiled, conversation_limit
from lightning_lora.data.chat.names import Names, as_read, read_names
from lightning_lora.data.chat.variables import parse_day
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import ChatTemplateError, did_you_mean

Span = tuple[int, int]
"""Index of the first character of a part of a text, and of the character after its last."""


def find_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, tools: bool = False
) -> str | None:
    """The text of a chat template, or None if the tokenizer has none and none is given.

    Args:
        tokenizer: The tokenizer, with one template, several by name, or none.
        chat_template: The name of one of the tokenizer's templates, a file, or the template itself. None takes the
            tokenizer's only template or the one named ``default``.
        tools: Whether the conversation has tools; the template named ``tool_use`` is then the default, if there is one.

    Raises:
        ConfigError: If there is no such template, or several and none is named ``default``.
    """
    own = tokenizer.chat_template or {}
    named: Mapping[str, str] = own if isinstance(own, Mapping) else {"default": own}
    if chat_template is None:
        if tools and "tool_use" in named:
            return named["tool_use"]
        if named and "default" not in named:
            raise ChatTemplateError(
                f"the tokenizer has several chat templates and none is its default; choose one of {sorted(named)} by "
                "chat_template."
            )
        return named.get("default")
    if chat_template in named:
        return named[chat_template]
    return _file_or_text(chat_template, named)


def _file_or_text(given: str, named: Mapping[str, str]) -> str:
    if "{{" in given or "{%" in given:
        return given
    path = os.path.expanduser(given)
    if os.path.isfile(path):
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateError(f"chat_template {given!r} cannot be read: {error}") from error
    names = f"The tokenizer's templates: {sorted(named)}." if named else "The tokenizer has no chat template."
    raise ChatTemplateError(
        f"chat_template {given!r} is not a file (looked from {os.getcwd()}), not the name of a template and not a "
        f"template, which would hold '{{{{' or '{{%'{did_you_mean(given, named)} {names}"
    )


def template_identity(tokenizer: PreTrainedTokenizerBase, settings: RowSettings) -> list[str | None]:
    """A key that changes if the chat template renders conversations differently: its text, and the day if it writes it.

    Raises:
        ConfigError: If there is no such template, or if it cannot be read.
    """
    found = [find_template(tokenizer, settings.chat_template, tools) for tools in (False, True)]
    dated = any(text is not None and Template(text).names.date for text in found)
    return [*found, settings.today.isoformat() if dated and "date" not in settings.chat_template_kwargs else None]


@dataclass(frozen=True)
class Template:
    """A chat template with the variables that conversations share.

    Args:
        text: The template.
        variables: Values of names in the template, special tokens included.
        today: The day that the template writes as today.

    Raises:
        ConfigError: If the text is no template.
    """

    text: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    today: date = field(default_factory=date.today)

    def __post_init__(self) -> None:
        compiled(self.text)

    @property
    def names(self) -> Names:
        """What the template reads."""
        return read_names(self.text)

    def with_variables(self, variables: Mapping[str, Any]) -> Template:
        """This template with further variables; ``date`` is the day that it writes as today.

        Raises:
            ConfigError: If ``date`` is no day.
        """
        if not variables:
            return self
        today = parse_day(variables["date"]) if "date" in variables else self.today
        return replace(self, variables={**self.variables, **variables}, today=today)

    def render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        """The text of some messages, as ``apply_chat_template`` renders it.

        Args:
            messages: The messages.
            prompt: Whether to end with the words after which the model writes its answer.
        """
        return self.render_all([messages], prompt, marked=False)[0][0]

    def render_marked(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
        """The text of some messages, and the parts of it inside of ``{% generation %}``."""
        return self.render_all([messages], prompt=False, marked=True)[0]

    def render_all(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], prompt: bool, marked: bool
    ) -> list[tuple[str, list[Span]]]:
        """The texts of several conversations and their marks; a call for many costs less than one for each.

        Raises:
            ConfigError: If the template does not end, or makes a text that is no Unicode or longer than any
                conversation.
        """
        # Not apply_chat_template: it does not return the marks, and its mask is empty for answers that begin with a
        # blank.
        given = [[as_read(message) for message in messages] for messages in conversations]
        with self._calendar(), conversation_limit():
            rendered: Any = render_jinja_template(
                given,
                chat_template=compiled(self.text).stand_in,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self.variables,
            )
        texts, marks = rendered
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise ChatTemplateError(
                f"the chat template, or a tool or variable in it, writes half a character: {error}"
            ) from error
        return list(zip(texts, marks if marked else [[] for _ in texts], strict=True))

    @contextmanager
    def _calendar(self) -> Iterator[None]:
        # one compiled template is kept for each text, and transformers gives it a function that reads the clock.
        names = compiled(self.text).environment.globals
        clock = names["strftime_now"]
        names["strftime_now"] = datetime.combine(self.today, time()).strftime
        try:
            yield
        finally:
            names["strftime_now"] = clock


def line_of_error(error: BaseException) -> str:
    """Where in its template an error was raised, for the end of a message; empty if it was raised elsewhere."""
    line: int | None = None
    frame: TracebackType | None = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return "" if line is None else f" (line {line} of the template)"
