"""Chat templates: conversations to text, with the spans of the assistant's answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .bad_rows import RowError
from .records import Conversation, Message

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
"""Index of the first character of an answer, and of the character after its last."""


def find_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template of a tokenizer, the one named ``default`` if it has several, or None."""
    return tokenizer.get_chat_template() if tokenizer.chat_template else None


def render_conversations(
    tokenizer: PreTrainedTokenizerBase, template: str, records: Sequence[Conversation]
) -> tuple[list[str], list[list[Span]]]:
    """Render conversations and find the spans of the answers, end-of-turn tokens included.

    The spans are given by the template's ``{% generation %}`` marks. Without marks, a span is the text that an
    assistant turn adds to the prompt before it.

    Returns:
        The text of each conversation, and the spans of its answers.

    Raises:
        RowError: If the template refuses a conversation, or if it has no marks and renders earlier turns differently
            in a longer conversation.
    """
    conversations = [record.messages for record in records]
    if _GENERATION.search(template):
        return _render(tokenizer, template, records, conversations, marked=True)
    texts, _ = _render(tokenizer, template, records, conversations)
    return texts, _turn_spans(tokenizer, template, records, texts)


def _turn_spans(
    tokenizer: PreTrainedTokenizerBase, template: str, records: Sequence[Conversation], texts: list[str]
) -> list[list[Span]]:
    turns = [
        (index, number)
        for index, record in enumerate(records)
        for number, message in enumerate(record.messages)
        if message["role"] == "assistant"
    ]
    for index, number in turns:
        if number == 0:
            place = records[index].place
            raise RowError(place, "starts with the assistant, so there is no prompt before its answer.")
    owners = [records[index] for index, _ in turns]
    before = [records[index].messages[:number] for index, number in turns]
    after = [records[index].messages[: number + 1] for index, number in turns]
    prompts, _ = _render(tokenizer, template, owners, before, prompt=True)
    answers, _ = _render(tokenizer, template, owners, after)
    # Text after the token that ends a turn (usually a line break) is never generated, so it is not trained on.
    marks = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip())
    spans: list[list[Span]] = [[] for _ in records]
    for (index, number), prompt, answer in zip(turns, prompts, answers, strict=True):
        if not (answer.startswith(prompt) and texts[index].startswith(answer)):
            raise RowError(
                records[index].place,
                f"the chat template renders turn {number} differently inside the whole "
                "conversation, so the answer cannot be told from the prompt. Put {% generation %} and "
                "{% endgeneration %} around the assistant's text in the template, or keep single-turn rows.",
            )
        closed = answer.rstrip()
        spans[index].append((len(prompt), len(closed) if closed.endswith(marks) else len(answer)))
    return spans


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    records: Sequence[Conversation],
    conversations: list[list[Message]],
    marked: bool = False,
    prompt: bool = False,
) -> tuple[list[str], list[list[Span]]]:
    # Not apply_chat_template: it does not return the spans, and its mask is empty for answers that begin with a blank.
    options: dict[str, Any] = {
        **tokenizer.special_tokens_map,
        "chat_template": template,
        "return_assistant_tokens_mask": marked,
        "add_generation_prompt": prompt,
    }
    try:
        rendered: Any = render_jinja_template(conversations, **options)
    except Exception:  # a template can raise anything; find the conversation that causes it
        for record, conversation in zip(records, conversations, strict=True):
            try:
                render_jinja_template([conversation], **options)
            except Exception as error:
                raise RowError(record.place, "the chat template refuses this conversation: ", str(error)) from error
        raise
    return rendered
