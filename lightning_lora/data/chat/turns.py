"""Where the answers of a conversation stand in its text, and what of them is trained on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.chat.answer import Answer, Renderer, Texts, closing_ends, message_texts, span_in
from lightning_lora.data.chat.long import find_alike
from lightning_lora.data.chat.profile import Profile
from lightning_lora.data.chat.template import Span
from lightning_lora.data.records import Conversation

BEGINS = "the first turn is the assistant's and is not trained on, as there is no prompt before it"
TYPED = "a message holds the text of a special token, which becomes a real one, as in transformers"
MARKS = (
    "the {% generation %} marks of the chat template leave out text that the model writes, so that text is not trained "
    "on"
)


@dataclass(frozen=True)
class Example:
    """A text and the parts of it that are trained on.

    Args:
        text: The text.
        spans: The parts that are trained on, in order.
        closes: Whether the token of ``end_of_answer`` follows, which is trained on too.
        notes: What is told about rows like this one.
    """

    text: str
    spans: list[Span]
    closes: bool = False
    notes: frozenset[str] = field(default_factory=frozenset)


def find_examples(profile: Profile, record: Conversation, texts: Texts | None = None) -> list[Example]:
    """The texts that a conversation becomes: one, or one for each answer.

    A conversation becomes one text if in the text of all of it each answer follows the same prompt as in inference, and
    reads as it does when it is the last one. Otherwise each answer becomes a text of its own. An answer is trained on
    from the first character that the model writes through the token that ends the turn.

    Args:
        profile: The chat template.
        record: The conversation.
        texts: What `answer.render_ahead` has rendered of it.

    Raises:
        RowError: If the template refuses the conversation, or if an answer cannot be told from its prompt.
    """
    renderer = Renderer(profile, record, texts)
    numbers = list(_trained(record))
    whole, marks = renderer.through(len(record.messages) - 1)
    notes = frozenset(_notes(profile, record))
    if not numbers:
        if BEGINS in notes:
            raise RowError(record.place, "starts with the assistant, so there is no prompt before its answer.")
        return [Example(whole, [])]
    spans = find_alike(renderer, numbers, whole)
    if spans is None:
        answers = [renderer.answer(number) for number in numbers]
        notes = notes.union(*(answer.notes for answer in answers))
        spans = [span for answer in answers if (span := span_in(whole, answer, profile)) is not None]
        if len(spans) < len(answers) or (profile.closes and _open_inside(whole, spans, profile)):
            return [_single(answer, profile, notes) for answer in answers]
    elif profile.closes and _open_inside(whole, spans, profile):
        return [_single(renderer.answer(number), profile, notes) for number in numbers]
    return [_example(whole, spans, marks, profile, notes)]


def _trained(record: Conversation) -> Iterator[int]:
    for number, message in enumerate(record.messages):
        if message["role"] == "assistant" and number > 0 and number not in record.untrained:
            yield number


def _notes(profile: Profile, record: Conversation) -> Iterator[str]:
    if record.messages[0]["role"] == "assistant" and 0 not in record.untrained:
        yield BEGINS
    if any(profile.typed.search(text) for message in record.messages for text in message_texts(message)):
        yield TYPED


def _single(answer: Answer, profile: Profile, notes: frozenset[str]) -> Example:
    return _example(answer.text, [(answer.start, answer.end)], answer.marks, profile, notes)


def _example(
    text: str, spans: list[Span], marks: list[Span] | None, profile: Profile, notes: frozenset[str]
) -> Example:
    trained = spans
    if marks is not None:
        trained = [part for span in spans for part in _marked(text, span, marks, profile)]
        if trained != spans:
            notes |= {MARKS}
    closes = False
    if not all(_ended(text, end, profile) for _, end in spans):
        closes = profile.closes and spans[-1][1] == len(text)
        notes |= frozenset() if closes else {profile.no_end}
    return Example(text, trained, closes, notes | profile.notes)


def _open_inside(text: str, spans: list[Span], profile: Profile) -> bool:
    """Whether an answer ends with no token and is followed by other text."""
    return any(end < len(text) and not _ended(text, end, profile) for _, end in spans)


def _ended(text: str, end: int, profile: Profile) -> bool:
    return text.endswith(profile.ends, 0, end) or any(text.endswith(token, 0, end) for token in profile.special)


def _marked(text: str, span: Span, marks: list[Span], profile: Profile) -> list[Span]:
    """The parts of an answer that the template's marks cover; its header, line breaks and end token are corrected."""
    start, end = span
    near = islice(marks, bisect_right(marks, start, key=lambda mark: mark[1]), None)
    inside = [(max(first, start), min(last, end)) for first, last in takewhile(lambda mark: mark[0] < end, near)]
    if not inside:
        return []
    inside[0] = (start if not text[start : inside[0][0]].strip() else inside[0][0], inside[0][1])
    rest = text[inside[-1][1] : end]
    ends = closing_ends(rest, 0, profile)
    if not rest.strip() or (ends and ends[0] == len(rest) and not _without(rest, profile)):
        inside[-1] = (inside[-1][0], end)
    joined = [inside[0]]
    for first, last in inside[1:]:
        if text[joined[-1][1] : first].strip():
            joined.append((first, last))
        else:
            joined[-1] = (joined[-1][0], last)
    return joined


def _without(text: str, profile: Profile) -> str:
    """The text without the tokens that the tokenizer never splits, and without white space around them."""
    for token in profile.added:
        text = text.replace(token, "")
    return text.strip()
