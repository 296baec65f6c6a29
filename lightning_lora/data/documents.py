"""Documents: texts that fill as many rows as they need instead of being cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy

from lightning_lora.data.encoding import Encoded
from lightning_lora.data.records import Conversation, Text


def divide_document(
    record: Conversation | Text, rows: Sequence[Encoded], max_length: int
) -> Iterator[tuple[Conversation | Text, Encoded]]:
    """Divide a document into rows of nearly equal length, at most ``max_length`` tokens each.

    No token is lost. The first token of a row is not trained on, as nothing precedes it there.

    Yields:
        The tokens of a row, and the record with its place in the document.
    """
    for row in rows:
        count = -(-len(row.ids) // max_length)
        places = [f"{record.place}, part {number} of {count}" for number in range(1, count + 1)]
        parts = zip(numpy.array_split(row.ids, count), numpy.array_split(row.supervised, count), strict=True)
        for place, (ids, supervised) in zip(places, parts, strict=True):
            trained = supervised.copy()
            trained[:1] = False
            yield replace(record, place=place), replace(row, ids=ids, supervised=trained)
