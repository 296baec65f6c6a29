"""Prompts to token ids, as in training."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.chat.answer import Renderer
from lightning_lora.data.chat.masks import PLAIN
from lightning_lora.data.chat.profile import find_profile
from lightning_lora.data.encoding import encode
from lightning_lora.data.records import Conversation, Text
from lightning_lora.data.settings import RowSettings


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Conversation | Text], settings: RowSettings
) -> list[list[int]]:
    """Token ids of conversations up to their next answer, and of texts to be continued.

    The ids are those before the answer in training: of the chat template's prompt, or without a template of a single
    question and the separator.

    Raises:
        RowError: If the chat template refuses a conversation, or there is none and it has several turns.
        ConfigError: If the chat template of the settings cannot be found.
    """
    profiles = {tools: find_profile(tokenizer, settings, tools) for tools in {_has_tools(one) for one in records}}
    found = []
    for record in records:
        profile = profiles[_has_tools(record)]
        if isinstance(record, Text):
            found.append(_open_end(tokenizer, record, settings))
        elif profile is None:
            found.append(_without_template(tokenizer, record, settings))
        else:
            # The template writes the begin token itself, where there is one.
            text = Renderer(profile, record).prompt(len(record.messages))
            found.append(list(tokenizer(text, **PLAIN)["input_ids"]))  # type: ignore[arg-type]
    return found


def _has_tools(record: Conversation | Text) -> bool:
    return isinstance(record, Conversation) and bool(record.variables.get("tools"))


def _without_template(tokenizer: PreTrainedTokenizerBase, record: Conversation, settings: RowSettings) -> list[int]:
    """What training would put before an answer."""
    if [message["role"] for message in record.messages] != ["user"]:
        raise RowError(
            record.place,
            "the tokenizer has no chat template, and these turns need one (only a single question does not): give "
            "--chat_template. ",
            f"The turns are {[message['role'] for message in record.messages]}.",
        )
    answered = Conversation(record.place, [*record.messages, {"role": "assistant", "content": "a"}])
    (rows,) = encode(tokenizer, [answered], settings)
    if isinstance(rows, RowError):
        raise rows
    return rows[0].ids[: int(rows[0].supervised.argmax())].tolist()


def _open_end(tokenizer: PreTrainedTokenizerBase, record: Text, settings: RowSettings) -> list[int]:
    """The tokens of a training text without the end token that was put after it."""
    (rows,) = encode(tokenizer, [record], settings)
    if isinstance(rows, RowError):
        raise rows
    ids = rows[0].ids.tolist()
    own = tokenizer(record.text, **PLAIN)["input_ids"]
    return ids[:-1] if ids[-1:] != own[-1:] else ids  # type: ignore[index]
