"""Pairs to token ids and masks: two rows of tokens for each pair, the chosen one first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy
from transformers import PreTrainedTokenizerBase

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.encoding import Encoded, encode
from lightning_lora.data.records import Conversation, Pair
from lightning_lora.data.settings import RowSettings


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], settings: RowSettings
) -> list[list[tuple[Conversation, Encoded]] | RowError]:
    """Tokenise pairs, in order: the chosen and the rejected row of each, or why it cannot be used.

    Nothing is trained on in a pair of which cutting to ``max_length`` leaves no difference, or one side no answer.
    """
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    encoded = iter(encode(tokenizer, sides, settings))
    return [_joined(pair, next(encoded), next(encoded), settings.max_length) for pair in pairs]


def _joined(
    pair: Pair, chosen: list[Encoded] | RowError, rejected: list[Encoded] | RowError, max_length: int
) -> list[tuple[Conversation, Encoded]] | RowError:
    for side in (chosen, rejected):
        if isinstance(side, RowError):
            return side
        if len(side) != 1:
            kind = "an answer of several turns becomes a text for each turn in this chat template, and only one can be"
            return RowError(pair.place, f"{kind} compared", f"; it became {len(side)}.")
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    rows = [chosen[0], rejected[0]]
    kept = [row.supervised[:max_length].any() for row in rows]
    if not all(kept) or numpy.array_equal(rows[0].ids[:max_length], rows[1].ids[:max_length]):
        rows = [replace(row, supervised=numpy.zeros_like(row.supervised)) for row in rows]
    return list(zip((pair.chosen, pair.rejected), rows, strict=True))
