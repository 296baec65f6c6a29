"""Conversations and texts to token ids and a mask of the supervised tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
from transformers import PreTrainedTokenizerBase

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.chat.answer import render_ahead
from lightning_lora.data.chat.endings import end_of_turn_ids, special_tokens
from lightning_lora.data.chat.masks import PLAIN, tokenise_marked
from lightning_lora.data.chat.profile import Profile, end_of_answer_id, find_profile
from lightning_lora.data.chat.template import find_template
from lightning_lora.data.chat.turns import TYPED, Example, find_examples
from lightning_lora.data.records import Conversation, Text
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import DataSettingError

_DEFAULTS = RowSettings(max_length=1)
_OF_TEMPLATES = ("chat_template_kwargs", "end_of_answer")
DOUBLED = "the text holds the begin or end token already, so it is not put there again"


@dataclass(frozen=True)
class Encoded:
    """One row of tokens.

    Args:
        ids: Token ids.
        supervised: Whether each token is trained on. The first token never is, as nothing precedes it.
        unused: Names of keys and variables of the conversation that the template does not read.
        notes: What else is to be told about the row, in the same words for every row that it is true of.

    Shape:
        - ``ids``: ``(tokens,)``, int64; ``supervised``: ``(tokens,)``, bool.
    """

    ids: numpy.ndarray
    supervised: numpy.ndarray
    unused: frozenset[str] = frozenset()
    notes: frozenset[str] = frozenset()


def encode(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Conversation | Text], settings: RowSettings
) -> list[list[Encoded] | RowError]:
    """Tokenise records, in order: the rows of tokens that each becomes, or why it cannot be used.

    Conversations are rendered by the chat template; one becomes several rows if the template renders earlier turns
    differently, one for each answer. Without a template, a single question and answer becomes the question, the
    separator, the answer and the end token; question and answer are tokenised separately. A plain text becomes the text
    and the end token. Both start with the begin token if the tokenizer adds one. What is there already is not doubled.

    Raises:
        ConfigError: If the tokenizer has no end token and the row needs one, if there is no such template, or if
            ``end_of_answer`` is not one token.
    """
    closing = end_of_answer_id(tokenizer, settings)
    with_tools = [isinstance(record, Conversation) and bool(record.variables.get("tools")) for record in records]
    results: dict[int, list[Encoded] | RowError] = {}
    for tools in sorted(set(with_tools)):
        chosen = [number for number, has in enumerate(with_tools) if has == tools]
        texts = [(i, record) for i in chosen if isinstance(record := records[i], Text)]
        chats = [(i, record) for i in chosen if isinstance(record := records[i], Conversation)]
        results |= _each(texts, _encode_texts(tokenizer, [record for _, record in texts], settings))
        profile = find_profile(tokenizer, settings, tools) if chats else None
        if profile is None:
            results |= _each(chats, _encode_pairs(tokenizer, [record for _, record in chats], settings))
        else:
            results |= _encode_chats(tokenizer, profile, chats, closing)
    for rows in results.values():
        for row in rows if isinstance(rows, list) else ():
            row.supervised[:1] = False
    return [results[number] for number in range(len(records))]


def _each(
    records: Sequence[tuple[int, Conversation | Text]], rows: list[Encoded | RowError]
) -> Iterator[tuple[int, list[Encoded] | RowError]]:
    for (number, _), row in zip(records, rows, strict=True):
        yield number, row if isinstance(row, RowError) else [row]


def _encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    profile: Profile,
    records: list[tuple[int, Conversation]],
    closing: int | None,
) -> dict[int, list[Encoded] | RowError]:
    results: dict[int, list[Encoded] | RowError] = {number: [] for number, _ in records}
    made: list[tuple[int, Conversation, Example]] = []
    texts = render_ahead(profile, [record for _, record in records])
    for (number, record), rendered in zip(records, texts, strict=True):
        try:
            made += [(number, record, example) for example in find_examples(profile, record, rendered)]
        except RowError as error:
            results[number] = error
    examples = [example for *_, example in made]
    tokens = tokenise_marked(tokenizer, [one.text for one in examples], [one.spans for one in examples])
    for (number, record, example), (ids, mask) in zip(made, tokens, strict=True):
        if example.closes and closing is not None:
            ids, mask = numpy.append(ids, closing), numpy.append(mask, True)
        rows = results[number]
        assert isinstance(rows, list)
        rows.append(Encoded(ids, mask, _unread(profile, record), example.notes))
    return results


def _unread(profile: Profile, record: Conversation) -> frozenset[str]:
    keys = {key for message in record.messages for key, value in message.items() if value is not None}
    names = profile.names
    read = names.variables | ({"date"} if names.date else set())
    return names.unread(keys - {"role", "content"}) | (record.variables.keys() - read)


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase, records: list[Text], settings: RowSettings
) -> list[Encoded | RowError]:
    if not records:
        return []
    frame = _Frame(tokenizer, settings)
    unused = _unused("a plain text", settings, "chat_template", *_OF_TEMPLATES, "train_on", "prompt_separator")
    rows: list[Encoded | RowError] = []
    for ids in _ids(tokenizer, [record.text for record in records]):
        whole = [*frame.before(ids), *ids, *frame.after(ids)]
        doubled = (frame.starts and not frame.before(ids)) or not frame.after(ids)
        notes = unused | ({DOUBLED} if doubled else set())
        rows.append(Encoded(numpy.array(whole), numpy.ones(len(whole), dtype=bool), notes=notes))
    return rows


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, records: list[Conversation], settings: RowSettings
) -> list[Encoded | RowError]:
    if not records:
        return []
    refused = [_needs_template(record) for record in records]
    pairs = [record for record, error in zip(records, refused, strict=True) if error is None]
    prompts = [record.messages[0]["content"] for record in pairs]
    joined = [text if text[-1:].isspace() else text + settings.prompt_separator for text in prompts]
    answers = _ids(tokenizer, [record.messages[1]["content"] for record in pairs])
    frame = _Frame(tokenizer, settings)
    rows = iter(_encode_pair(frame, *pair) for pair in zip(pairs, _ids(tokenizer, joined), answers, strict=True))
    return [next(rows) if error is None else error for error in refused]


def _encode_pair(frame: _Frame, record: Conversation, prompt: list[int], answer: list[int]) -> Encoded:
    before, after = frame.before(prompt), frame.after(answer)
    ids = numpy.array([*before, *prompt, *answer, *after])
    mask = numpy.arange(len(ids)) >= len(before) + len(prompt)
    if 1 in record.untrained:
        mask[:] = False
    notes = {*frame.unused, *([DOUBLED] if (frame.starts and not before) or not after else ())}
    if frame.special & {*prompt, *answer[:-1]}:
        notes.add(TYPED)
    keys = {key for message in record.messages for key in message}
    return Encoded(ids, mask, frozenset((keys - {"role", "content"}) | set(record.variables)), frozenset(notes))


def _unused(rows: str, settings: RowSettings, *names: str) -> frozenset[str]:
    """What is told about rows for which some settings were given that change nothing in them."""
    given = [name for name in names if getattr(settings, name) != getattr(_DEFAULTS, name)]
    return frozenset([f"{' and '.join(given)} change{'s' * (len(given) == 1)} nothing in {rows}"] if given else ())


def _needs_template(record: Conversation) -> RowError | None:
    roles = [message["role"] for message in record.messages]
    if roles == ["user", "assistant"] and all(isinstance(message.get("content"), str) for message in record.messages):
        return None
    return RowError(
        record.place,
        "the tokenizer has no chat template, and these turns need one (only a single user turn with an answer does "
        "not). Use the tokenizer of an instruction-tuned model, or give a chat_template. ",
        f"The turns are {roles}.",
    )


class _Frame:
    """The tokens around a text that no chat template renders: the begin token, if the tokenizer adds one, and the end.

    Args:
        tokenizer: A fast tokenizer.
        settings: How rows become tokens.

    Raises:
        ConfigError: If the tokenizer has no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: RowSettings) -> None:
        if tokenizer.eos_token_id is None:
            raise DataSettingError(
                "the tokenizer has no eos_token, so the model could not learn where to stop; set one."
            )
        first = tokenizer("a", **{**PLAIN, "add_special_tokens": True})["input_ids"][0]  # type: ignore[index]
        self.starts = [first] if first == tokenizer.bos_token_id else []
        self.special = frozenset(tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer))))  # type: ignore[arg-type]
        self.unused = _unused("a row without a chat template", settings, *_OF_TEMPLATES)
        self._end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        chosen = settings.chat_template is not None or isinstance(tokenizer.chat_template, str)
        template = find_template(tokenizer, settings.chat_template) if chosen else None
        self._ends = {self._end, *(end_of_turn_ids(tokenizer, template) if template else ())}
        self._blank = frozenset(i for text in ("\n", "\n\n", " ") for i in _ids(tokenizer, [text])[0][:1])

    def before(self, ids: Sequence[int]) -> list[int]:
        """What is put before some tokens: nothing if they begin with a special token."""
        return [] if ids and ids[0] in self.special else self.starts

    def after(self, ids: Sequence[int]) -> list[int]:
        """What is put after some tokens: nothing if they end with the end token, or with that of a turn."""
        last = next((token for token in reversed(ids) if token not in self._blank), None)
        return [] if last in self._ends else [self._end]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, **PLAIN)["input_ids"] if texts else []  # type: ignore[return-value]
