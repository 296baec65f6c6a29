"""Conversations and texts to token ids and a mask of the supervised tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from lightning_lora.errors import ConfigError

from .bad_rows import RowError
from .records import Conversation, Text
from .settings import RowSettings
from .template import Span, find_template, render_conversations


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

    Conversations are rendered by the tokenizer's chat template. Without a template, a single question and answer
    becomes the question, a line break, the answer and the end token; question and answer are tokenised separately. A
    plain text becomes the text and the end token. Both start with the begin token if the tokenizer adds one.

    Raises:
        ConfigError: If the tokenizer has no end token and the row needs one.
    """
    try:
        return [[row] for row in _encode(tokenizer, records)]
    except RowError as error:
        if len(records) == 1:
            return [error]
        return [encode(tokenizer, [record], settings)[0] for record in records]


def _encode(tokenizer: PreTrainedTokenizerBase, records: Sequence[Conversation | Text]) -> list[Encoded]:
    texts = [record for record in records if isinstance(record, Text)]
    conversations = [record for record in records if isinstance(record, Conversation)]
    template = find_template(tokenizer)
    if texts:
        encoded = _encode_texts(tokenizer, texts)
    elif template is None:
        encoded = _encode_pairs(tokenizer, conversations)
    else:
        encoded = _encode_spans(tokenizer, *render_conversations(tokenizer, template, conversations))
    for row in encoded:
        row.supervised[:1] = False
    return encoded


def _encode_texts(tokenizer: PreTrainedTokenizerBase, records: list[Text]) -> list[Encoded]:
    start, end = _start_ids(tokenizer), [_end_id(tokenizer)]
    rows = [numpy.array([*start, *ids, *end]) for ids in _ids(tokenizer, [record.text for record in records])]
    return [Encoded(ids, numpy.ones(len(ids), dtype=bool)) for ids in rows]


def _encode_pairs(tokenizer: PreTrainedTokenizerBase, records: list[Conversation]) -> list[Encoded]:
    for record in records:
        roles = [message["role"] for message in record.messages]
        if roles != ["user", "assistant"]:
            raise RowError(
                record.place,
                f"the tokenizer has no chat template, and the turns {roles} need one (only a single "
                "user turn with an answer does not). Use the tokenizer of an instruction-tuned model, or set its "
                "chat_template.",
            )
    start, end = _start_ids(tokenizer), [_end_id(tokenizer)]
    prompts = _ids(tokenizer, [record.messages[0]["content"] + "\n" for record in records])
    answers = _ids(tokenizer, [record.messages[1]["content"] for record in records])
    rows = [
        (len(start) + len(prompt), numpy.array([*start, *prompt, *answer, *end]))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return [Encoded(ids, numpy.arange(len(ids)) >= boundary) for boundary, ids in rows]


def _encode_spans(tokenizer: PreTrainedTokenizerBase, texts: list[str], spans: list[list[Span]]) -> list[Encoded]:
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, **_PLAIN)
    return [
        Encoded(numpy.array(ids, dtype=numpy.int64), _covers(numpy.array(offsets).reshape(-1, 2), row_spans))
        for ids, offsets, row_spans in zip(batch["input_ids"], batch["offset_mapping"], spans, strict=True)
    ]


def _covers(offsets: numpy.ndarray, spans: list[Span]) -> numpy.ndarray:
    """Whether each token covers a character of a span."""
    # Byte-level tokenizers trim blanks off the offsets and give all bytes of a character the same offsets.
    # A token therefore starts where the token before it ended, or earlier if its offset says so.
    ends = offsets[:, 1]
    starts = numpy.minimum(offsets[:, 0], numpy.concatenate([[0], ends[:-1]]))
    covered = numpy.zeros(len(offsets), dtype=bool)
    for first, last in spans:
        covered |= (starts < last) & (ends > first)
    return covered


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, **_PLAIN)["input_ids"]  # type: ignore[return-value]


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first = tokenizer("a", **_PLAIN)["input_ids"][0]  # type: ignore[index]
    return [first] if first == tokenizer.bos_token_id else []


def _end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no eos_token, so the model could not learn where to stop; set one.")
    return int(tokenizer.eos_token_id)  # type: ignore[arg-type]


_PLAIN: dict[str, Any] = {"padding": False, "truncation": False, "verbose": False}
"""Tokenizer options; rows are cut in `tokens` and padded in `collate`."""
