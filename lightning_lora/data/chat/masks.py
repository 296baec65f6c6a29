"""Texts with marked parts to token ids and a mask, without a token across the edge of a marked part."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from lightning_lora.data.chat.template import Span

PLAIN: dict[str, Any] = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
"""Tokenizer options; rows are cut and padded later."""

Tokens = tuple[numpy.ndarray, numpy.ndarray]
"""Token ids, int64, and whether each token belongs to a marked part, bool."""


def tokenise_marked(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> list[Tokens]:
    """Tokenise texts, and mark the tokens of some parts of them.

    A text is tokenised as a whole. Where a token would reach across the edge of a marked part, which a model that is
    given the prompt alone could not write, the text is tokenised anew with a cut there.

    Args:
        tokenizer: A fast tokenizer.
        texts: The texts.
        spans: The marked parts of each text, in order.
    """
    if not texts:
        return []
    tokenizer("", **PLAIN)  # sets the options; what it makes of ids and offsets as lists is not needed, and is slow
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    encodings: list[Encoding] = backend.encode_batch(list(texts), add_special_tokens=False)
    edges = [[edge for span in row for edge in span] for row in spans]
    places = [[_first_token(encoding, edge) for edge in row] for encoding, row in zip(encodings, edges, strict=True)]
    wall = _wall(tokenizer)
    tokens = []
    for text, encoding, row, found in zip(texts, encodings, edges, places, strict=True):
        cuts = [edge for edge, (_, crossed) in zip(row, found, strict=True) if crossed]
        if cuts and wall:
            tokens.append(_cut(tokenizer, wall, text, row, cuts))
        else:
            tokens.append(_marked(encoding.ids, [index for index, _ in found]))
    return tokens


def _cut(tokenizer: PreTrainedTokenizerBase, wall: str, text: str, edges: list[int], cuts: list[int]) -> Tokens:
    """Tokenise a text with cuts: a special token is put there, which nothing merges with, and taken out again."""
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    encoding: Encoding = tokenizer(wall.join(pieces), **PLAIN).encodings[0]  # type: ignore[index]
    walls = {_first_token(encoding, cut + number * len(wall))[0] for number, cut in enumerate(cuts)}
    ids = [token for index, token in enumerate(encoding.ids) if index not in walls]
    places = []
    for edge in edges:
        index, _ = _first_token(encoding, edge + sum(cut < edge for cut in cuts) * len(wall))
        places.append(index - sum(place < index for place in walls))
    return _marked(ids, places)


def _wall(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a token that merges with nothing and takes no white space from its neighbours; empty if none does."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and not (token.lstrip or token.rstrip or token.single_word):
            return token.content
    return ""


def _marked(ids: Sequence[int], places: Sequence[int]) -> Tokens:
    mask = numpy.zeros(len(ids), dtype=bool)
    for first, last in zip(places[::2], places[1::2], strict=True):
        mask[first:last] = True
    return numpy.array(ids, dtype=numpy.int64), mask


def _first_token(encoding: Encoding, edge: int) -> tuple[int, bool]:
    """The first token that covers text after an edge, and whether it covers text before the edge too."""
    # Byte-level tokenizers trim blanks off the offsets and give all bytes of a character the same offsets.
    # A token therefore starts where the token before it ended, or earlier if its offset says so.
    count = len(encoding)
    index = bisect_right(range(count), edge, key=lambda token: _span(encoding, token)[1])
    if index == count or edge == 0:
        return index, False
    before = _span(encoding, index - 1)[1] if index else 0
    return index, min(before, _span(encoding, index)[0]) < edge


def _span(encoding: Encoding, index: int) -> Span:
    return encoding.token_to_chars(index) or (0, 0)
