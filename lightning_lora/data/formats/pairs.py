"""Rows with two answers of which one is preferred."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.formats.beside import read_variables, read_weight, with_system
from lightning_lora.data.formats.names import PAIRS
from lightning_lora.data.formats.question import read_answer, read_question
from lightning_lora.data.formats.row import NamedRow
from lightning_lora.data.formats.turns import Turn, read_turns
from lightning_lora.data.formats.values import factor, parsed, read_text
from lightning_lora.data.reading import Row
from lightning_lora.data.records import Conversation, Pair
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import first_five

_SIDES = ("chosen", "rejected")
# Transcripts of HH-RLHF.
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PairFormat:
    """A way to write a pair in columns: a prompt and two answers, or two whole conversations.

    Args:
        prompt: The column with the prompt; None if ``chosen`` and ``rejected`` hold it.
        settings: How rows become tokens.
    """

    prompt: str | None
    settings: RowSettings

    def read(self, row: Row) -> Pair:
        """Convert a row to a pair.

        Raises:
            RowError: If the row cannot be used.
        """
        named = NamedRow(row, self.settings)
        chosen, rejected = (with_system(named, turns) for turns in self._sides(named))
        start = _length_of_prompt(chosen, rejected, row.place)
        variables, weight = read_variables(named), read_weight(named)
        margin = None if (given := named.take("margin")) is None else factor(given, "margin", row.place)
        worse, better = (
            Conversation(row.place, [turn.message for turn in turns], _before(turns, start), variables, weight)
            for turns in (rejected, chosen)
        )
        better = replace(better, unused=named.left(), renamed=frozenset(named.renamed))
        return Pair(row.place, better, worse, margin)

    def _sides(self, row: NamedRow) -> tuple[list[Turn], ...]:
        """The turns of both sides, from the beginning of the conversation."""
        if self.prompt is None:
            return tuple(_conversation(row, side) for side in _SIDES)
        answers = tuple(read_answer(row, side) for side in _SIDES)
        if all(turns[0].message["role"] != "assistant" for turns in answers):
            row.take(self.prompt)  # which both hold already
            return answers
        question = read_question(row, self.prompt)
        return tuple([*question, *turns] for turns in answers)


def find_pair_format(row: Row, settings: RowSettings) -> PairFormat:
    """The format of a row with two answers.

    Raises:
        RowError: If no format fits. The message names the columns of the row and the known formats.
    """
    filled = {name for name, value in NamedRow(row, settings).columns.items() if value is not None}
    for columns in PAIRS:
        if filled >= set(columns):
            return PairFormat(next((name for name in columns if name not in _SIDES), None), settings)
    shown = first_five(map(repr, row.columns)) or "(none)"
    formats = "; ".join(map(" + ".join, PAIRS))
    raise RowError(
        row.place,
        f"the columns {shown} are no pair",
        f". A pair has two answers, of which the first is preferred: {formats}. Map your names to these, for example "
        "columns: {better: chosen, worse: rejected}.",
    )


def _conversation(row: NamedRow, side: str) -> list[Turn]:
    """A list of messages, or a transcript."""
    if not isinstance(parsed(row.columns.get(side)), str):
        return read_turns(row, side)
    row.take(side)
    text = read_text(row.columns, side, row.place)
    parts = _SPEAKER.split(text)
    if len(parts) < 3 or parts[0].strip():
        kind = f"{side!r} is a text without its prompt"
        advice = (
            "give the prompt in a column 'prompt', or write a transcript: two line breaks, 'Human:' or 'Assistant:'."
        )
        raise RowError(row.place, kind, f"; {advice}")
    turns = []
    for number, (speaker, said) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        place = f"{row.place}, {side}, turn {number}"
        content = read_text({speaker: said.strip()}, speaker, place)
        turns.append(Turn({"role": _ROLES[speaker], "content": content}))
    return turns


def _length_of_prompt(chosen: Sequence[Turn], rejected: Sequence[Turn], place: str) -> int:
    """The number of turns that both sides begin with.

    Raises:
        RowError: If what follows them is no answer on both sides.
    """
    both = list(zip(chosen, rejected, strict=False))
    start = next((i for i, (one, other) in enumerate(both) if one.message != other.message), len(both))
    if start == len(chosen) == len(rejected):
        raise RowError(place, "chosen and rejected are equal, so neither is preferred", "; remove the row.")
    sides = dict(zip(_SIDES, (chosen, rejected), strict=True))
    for side, turns in sides.items():
        if start == len(turns):
            raise RowError(place, f"{side!r} has no answer of its own", ": the other side begins with all of it.")
        if turns[start].message["role"] != "assistant":
            kind = "chosen and rejected do not answer the same prompt"
            raise RowError(place, kind, f": they differ first in turn {start}, the {turns[start].message['role']}'s.")
        if turns[-1].message["role"] != "assistant":
            raise RowError(place, f"{side!r} does not end with a turn of the assistant", ".")
    if not start:
        raise RowError(place, "there is no prompt before the answers", "; put it before them, or in a column 'prompt'.")
    return start


def _before(turns: Sequence[Turn], start: int) -> frozenset[int]:
    """Turns of the assistant that belong to the prompt, or that the row excludes."""
    return frozenset(i for i, turn in enumerate(turns) if i < start or not turn.trained)
