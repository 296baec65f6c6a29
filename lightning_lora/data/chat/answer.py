"""One answer as inference sees it: the prompt before it, and what the model writes after that prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.chat.endings import common_prefix
from lightning_lora.data.chat.profile import Profile
from lightning_lora.data.chat.template import Span, Template, line_of_error
from lightning_lora.data.chat.variables import check_names
from lightning_lora.data.records import Conversation, Message
from lightning_lora.errors import ConfigError

OTHER_PROMPT = (
    "the chat template ends a prompt in words that do not begin the finished answer, which its {% generation %} marks "
    "show; the model learns answers after another prompt than it is given later"
)


Texts = dict[tuple[int, bool], tuple[str, list[Span]]]
"""Text and marks of the first messages of a conversation, by their number and whether a prompt follows them."""


@dataclass(frozen=True)
class Answer:
    """The text of a conversation through one of its answers.

    Args:
        text: The prompt and the answer, and what the template writes after it.
        start: Index of the first character that the model writes.
        ends: Indices at which the answer may end, the last one first: after each of the tokens that close the text.
            Empty if it closes with no token.
        marks: The parts of ``text`` inside of ``{% generation %}``; None if the template has no such marks or none
            that fit this text.
        notes: What is told about rows with such an answer.
    """

    text: str
    start: int
    ends: tuple[int, ...]
    marks: list[Span] | None = None
    notes: frozenset[str] = frozenset()

    @property
    def end(self) -> int:
        """Index of the character after the last one that the model writes."""
        return self.ends[0] if self.ends else len(self.text)


class Renderer:
    """Renders the beginnings of one conversation.

    Args:
        profile: The chat template.
        record: The conversation.
        texts: What `render_ahead` has rendered of it.

    Raises:
        RowError: If its variables cannot be given to a template.
    """

    def __init__(self, profile: Profile, record: Conversation, texts: Texts | None = None) -> None:
        self.profile = profile
        self.record = record
        try:
            self._template = profile.template.with_variables(check_names(record.variables))
        except ConfigError as error:
            raise RowError(record.place, "variables for the chat template that cannot be used: ", str(error)) from error
        self._texts = {} if texts is None else texts

    def prompt(self, number: int) -> str:
        """The prompt after which the model writes message ``number``."""
        return self._rendered(number, prompt=True)[0]

    def through(self, number: int) -> tuple[str, list[Span] | None]:
        """The text of the conversation up to and with message ``number``, and its marks, if the template has any."""
        text, marks = self._rendered(number + 1)
        return text, marks if self.profile.marked else None

    def answer(self, number: int) -> Answer:
        """Message ``number``, by the assistant, as inference sees it.

        Raises:
            RowError: If the template refuses the messages, or if what follows the prompt cannot be told.
        """
        prompt = self.prompt(number)
        text, marks = self.through(number)
        if text.startswith(prompt):
            return Answer(text, len(prompt), closing_ends(text, len(prompt), self.profile), marks)
        if text.startswith(prompt.rstrip()):
            written = text[len(prompt.rstrip()) :].lstrip()
        else:
            written = self._after_header(number, prompt, text)
        if written is None:
            written = _after_opening(self.record.messages[number], prompt, text, self.profile)
        if written is not None:
            joined = prompt + written
            return Answer(joined, len(prompt), closing_ends(joined, len(prompt), self.profile))
        if marks:
            own = marks[len(self._rendered(number)[1]) :]
            if own:
                ends = closing_ends(text, own[0][0], self.profile)
                return Answer(text, own[0][0], ends, marks, frozenset({OTHER_PROMPT}))
        return self._refuse(prompt, text)

    def _after_header(self, number: int, prompt: str, text: str) -> str | None:
        """What follows the header of an answer whose prompt the template renders differently once it is answered."""
        before = self._rendered(number)[0]
        header = prompt[len(before) :] if prompt.startswith(before) else ""
        if not header.strip() or text.count(header) <= before.count(header):
            return None
        return text.rpartition(header)[2]

    def _rendered(self, count: int, prompt: bool = False) -> tuple[str, list[Span]]:
        if (count, prompt) not in self._texts:
            messages = self.record.messages[:count]
            self._texts[count, prompt] = render(self._template, self.record, messages, prompt, self.profile.marked)
        return self._texts[count, prompt]

    def _refuse(self, prompt: str, text: str) -> Answer:
        shared = len(common_prefix(prompt, text))
        raise RowError(
            self.record.place,
            "what the model writes after the prompt cannot be told: the chat template ends the prompt in words that do "
            "not begin the finished answer, and the answer does not begin so. If the prompt opens the thinking, "
            "write it into the content ('<think>...</think>answer'), or use another chat_template. ",
            f"The prompt goes on with {prompt[shared:][:60]!r}, the finished answer with {text[shared:][:60]!r}.",
        )


def render_ahead(profile: Profile, records: Sequence[Conversation]) -> list[Texts]:
    """Render what every conversation needs, many together: all of it, and the prompt of its last answer.

    Nothing is rendered ahead if the template refuses one of them, or of one with variables of its own: a `Renderer`
    then renders each by itself, and says which is refused.
    """
    texts: list[Texts] = [{} for _ in records]
    numbered = [(number, record) for number, record in enumerate(records) if not record.variables]
    last = {
        number: max((i for i, message in enumerate(record.messages) if message["role"] == "assistant"), default=0)
        for number, record in numbered
    }
    wholes = [(number, len(record.messages), False) for number, record in numbered]
    prompts = [(number, last[number], True) for number, _ in numbered if last[number]]
    for wanted in (wholes, prompts):
        parts = [records[number].messages[:count] for number, count, _ in wanted]
        try:
            rendered = profile.template.render_all(parts, wanted is prompts, profile.marked and wanted is wholes)
        except ConfigError:
            raise
        except Exception:  # a template can raise anything
            return [{} for _ in records]
        for (number, count, prompt), text in zip(wanted, rendered, strict=True):
            texts[number][count, prompt] = text
    return texts


def render(
    template: Template, record: Conversation, messages: Sequence[Message], prompt: bool = False, marked: bool = False
) -> tuple[str, list[Span]]:
    """Render messages of a conversation, with the marks of the template.

    Raises:
        ConfigError: If the template does not end, or makes a text without end.
        RowError: If the template refuses them. The message has the line of the template.
    """
    try:
        if marked and not prompt:
            return template.render_marked(messages)
        return template.render(messages, prompt), []
    except ConfigError:
        raise
    except Exception as error:  # a template can raise anything
        what = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise RowError(
            record.place, "the chat template refuses this conversation: ", f"{what}{line_of_error(error)}"
        ) from error


def span_in(whole: str, answer: Answer, profile: Profile) -> Span | None:
    """The answer's place in the text of a longer conversation, or None if it reads otherwise there."""
    text, start = answer.text, answer.start
    if not whole.startswith(text[:start]):
        return None
    for end in answer.ends:
        if (end == answer.end or text.endswith(profile.ends, start, end)) and whole.startswith(text[start:end], start):
            return start, end
    if answer.ends or not whole.startswith(text[start:].rstrip(), start):
        return None
    end = len(text) if whole.startswith(text[start:], start) else len(text.rstrip())
    following = profile.pattern.match(whole, len(whole) - len(whole[end:].lstrip())) if profile.ends else None
    return start, following.end() if following else end


def closing_ends(text: str, start: int, profile: Profile) -> tuple[int, ...]:
    """Indices after the tokens that close a text, the last one first; white space between them does not count."""
    found: list[int] = []
    closed = text.rstrip()
    while len(closed) > start and closed.endswith(profile.added):
        token = next(token for token in profile.added if closed.endswith(token))
        if found and token not in profile.special:
            break
        found.append(len(closed))
        closed = closed[: -len(token)].rstrip()
    return tuple(found)


def _after_opening(message: Message, prompt: str, text: str, profile: Profile) -> str | None:
    """What follows a prompt that has opened the answer, such as by ``<think>``, if the content begins so too.

    The template may have dropped what the content has before the answer proper, so the content says what the model
    writes, and the template only the calls of tools after it and what closes the turn.
    """
    content = message.get("content")
    if not isinstance(content, str):
        return None
    said, opened = content.strip(), prompt.rstrip()
    shared = len(common_prefix(prompt, text))
    lengths = range(len(opened) - shared, min(len(opened), len(said)) + 1)
    length = next((n for n in lengths if n > 0 and opened.endswith(said[:n])), None)
    if length is None:
        return None
    ends = closing_ends(text, shared, profile)
    first = _start_of_closing(text, ends, profile)
    shown = text[len(opened) - length : first].strip()
    kept = next((n for n in range(min(len(shown), len(said)), 0, -1) if said.endswith(shown[:n])), 0)
    if kept < len(shown) and not message.get("tool_calls"):
        return None
    blank, rest = prompt[len(opened) :], said[length:]
    return (rest.removeprefix(blank) if rest.startswith(blank) else rest.lstrip()) + shown[kept:] + text[first:]


def _start_of_closing(text: str, ends: tuple[int, ...], profile: Profile) -> int:
    """Index of the first character of the tokens that close a text."""
    closed = text.rstrip()
    for end in ends:
        token = next(token for token in profile.added if text.endswith(token, 0, end))
        closed = text[: end - len(token)].rstrip()
    return len(closed)


def message_texts(message: Message) -> list[str]:
    """The texts of a message, those inside of lists and mappings included."""
    waiting, texts = list(message.values()), []
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return texts
