"""What decides how a row becomes tokens, apart from the row and the tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from lightning_lora.data.chat.variables import check_variables
from lightning_lora.data.formats.names import check_names
from lightning_lora.errors import DataSettingError, check_choice

TRAINED = ("answers", "last answer")


@dataclass(frozen=True)
class RowSettings:
    """Settings of a data module that change the tokens or the mask of a row; all of them are in the cache key.

    Args:
        max_length: Tokens kept of each row, from its beginning.
        columns: A file's own names of columns and of keys of messages, to known ones: ``{"frage": "question"}``.
        train_on: ``"answers"`` trains on every answer of the assistant, ``"last answer"`` on the last one only.
        chat_template: The chat template: its name in the tokenizer, a file, or the template itself. None takes the
            tokenizer's default.
        chat_template_kwargs: Variables for the chat template, such as ``enable_thinking``. ``date`` (``YYYY-MM-DD``) is
            the day that a template writes as today.
        end_of_answer: Text of a token put after each answer if the chat template ends it with none. None adds none.
        prompt_separator: Text between prompt and answer for a tokenizer without a chat template; none is put after a
            prompt that ends in white space.
        pairs: Whether a row holds two answers of which one is preferred.
        today: The day on which the settings were made. It is no part of the `identity`, but of that of a chat template
            that writes it.
    """

    max_length: int
    columns: Mapping[str, str] = field(default_factory=dict)
    train_on: str = "answers"
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    end_of_answer: str | None = None
    prompt_separator: str = "\n"
    pairs: bool = False
    today: date = field(default_factory=date.today)

    def __post_init__(self) -> None:
        if not isinstance(self.columns, Mapping):
            raise DataSettingError(f"columns must map a file's own names to known ones, got {self.columns!r}.")
        if not isinstance(self.prompt_separator, str):
            raise DataSettingError(f"prompt_separator must be a text, got {self.prompt_separator!r}.")
        check_names(self.columns)
        object.__setattr__(self, "chat_template_kwargs", check_variables(self.chat_template_kwargs))
        check_choice("train_on", self.train_on, TRAINED, DataSettingError)

    def identity(self) -> dict[str, Any]:
        """A key that changes if rows may become other tokens."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "today"}
