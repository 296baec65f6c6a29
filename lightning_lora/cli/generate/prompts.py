"""What a model is asked: texts of the command line, and rows of files with a system message of the user's."""

from __future__ import annotations

import dataclasses
from itertools import islice

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.formats.values import check_text
from lightning_lora.data.prompts.read_prompts import Prompt, prompt_rows
from lightning_lora.data.records import Text
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import DataError


def read_prompts(names: str | list[str], settings: RowSettings, limit: int | None = None) -> list[Prompt]:
    """Read prompts from files or hub datasets, with their answers set aside as references.

    Every line of a ``.txt`` file is a prompt. Other files are read as training rows are; a row may lack its answer.

    Args:
        names: Files, globs or hub names.
        settings: How the run has read its rows.
        limit: Number of prompts, from the first; None reads all.

    Raises:
        DataError: If a file cannot be read, or a row holds no prompt.
    """
    found: list[Prompt] = []
    for prompt in islice(prompt_rows(names, settings, "test"), limit):
        if isinstance(prompt, RowError):
            raise prompt
        found.append(prompt)
    return found


def with_system(prompt: Prompt, system: str) -> Prompt:
    """``prompt`` with a system message, in place of its own if it has one.

    Raises:
        DataError: If the prompt is a text to be continued, or the message holds half a character.
    """
    if isinstance(prompt.record, Text):
        raise DataError(f"{prompt.record.place} is a text to be continued, which has no system message.")
    check_text(system, "--system", prompt.record.place)
    others = [message for message in prompt.record.messages if message["role"] != "system"]
    messages = [{"role": "system", "content": system}, *others]
    return dataclasses.replace(prompt, record=dataclasses.replace(prompt.record, messages=messages))
