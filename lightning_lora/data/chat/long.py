"""Long conversations: their answers are found with few renderings, where answers of one kind are rendered alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from lightning_lora.data.chat.answer import Renderer, message_texts, span_in
from lightning_lora.data.chat.endings import common_prefix
from lightning_lora.data.chat.profile import Profile
from lightning_lora.data.chat.template import Span
from lightning_lora.data.records import Message

FEW = 3
"""Conversations with more answers than this are long."""


def find_alike(renderer: Renderer, numbers: Sequence[int], whole: str) -> list[Span] | None:
    """The answers in the text of a long conversation, or None if each has to be rendered by itself.

    To render each answer with all that comes before it costs the square of the number of turns. Here the end of the
    prompt and the token that ends an answer are searched in the text instead. One answer of each kind, and the last
    one, are rendered by themselves, and must stand where the search says.

    Args:
        renderer: Renders parts of the conversation.
        numbers: The messages whose answers are to be found.
        whole: The text of the whole conversation.
    """
    profile, messages = renderer.profile, renderer.record.messages
    if len(numbers) <= FEW or not profile.ends:
        return None
    answering = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if any(profile.pattern.search(text) for number in answering for text in message_texts(messages[number])):
        return None
    starts = _starts(whole, profile.prompt_end, renderer.prompt(numbers[-1]), len(answering))
    if starts is None:
        return None
    found: dict[int, Span] = {}
    for number, start in zip(answering, starts, strict=True):
        end = profile.pattern.search(whole, start)
        if end is None:
            return None
        found[number] = start, end.end()
    kinds = {_kind(messages, number, profile): number for number in reversed(numbers)}
    for number in {*kinds.values(), numbers[-1]}:
        span = span_in(whole, renderer.answer(number), profile)
        if number == len(messages) - 1 and span is not None and span[0] == found[number][0]:
            found[number] = span  # a template may close the conversation with a further token
        if span != found[number]:
            return None
    return [found[number] for number in numbers]


def _starts(whole: str, prompt_end: str, prompt: str, count: int) -> list[int] | None:
    """Where the answers begin, if the end of the prompt stands in the text once before each of them."""
    header = common_prefix(prompt_end[::-1], prompt[::-1])[::-1]
    if not header.strip() or whole.count(header) != count:
        return None
    starts, position = [], 0
    for _ in range(count):
        position = whole.index(header, position) + len(header)
        starts.append(position)
    return starts


def _kind(messages: Sequence[Message], number: int, profile: Profile) -> Hashable:
    """What decides how an answer is rendered: its keys, the roles around it, and words that the template looks for."""
    message = messages[number]
    around = [messages[i]["role"] if i < len(messages) else None for i in (number - 1, number + 1)]
    keys = frozenset(key for key, value in message.items() if value is not None)
    words = frozenset(word for word in profile.names.words for text in message_texts(message) if word in text)
    return keys, *around, words
