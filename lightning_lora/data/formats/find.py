"""The format of a row, and how it is read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.formats.beside import read_variables, read_weight, with_system
from lightning_lora.data.formats.names import BESIDE, COLUMNS, FORMATS, PAIRS
from lightning_lora.data.formats.question import read_answer, read_question
from lightning_lora.data.formats.row import NamedRow
from lightning_lora.data.formats.suggest import suggest_names
from lightning_lora.data.formats.turns import Turn, read_turns
from lightning_lora.data.formats.values import read_text
from lightning_lora.data.reading import Row
from lightning_lora.data.records import Conversation, Text
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import did_you_mean, first_five


@dataclass(frozen=True)
class Format:
    """A way to write a training example in columns.

    Args:
        columns: Columns that a row must have, one of `names.FORMATS`.
        settings: How rows become tokens.
    """

    columns: tuple[str, ...]
    settings: RowSettings

    def read(self, row: Row) -> Conversation | Text:
        """Convert a row to a conversation or a text.

        Raises:
            RowError: If the row cannot be used.
        """
        named = NamedRow(row, self.settings)
        if self.columns == ("text",):
            named.take("text")
            text, weight = read_text(named.columns, "text", row.place), read_weight(named)
            return Text(row.place, text, weight, named.left(), frozenset(named.renamed))
        turns, variables, weight = self._turns(named), {}, 1.0
        if not BESIDE.isdisjoint(named.columns):
            turns = with_system(named, turns)
            variables, weight = read_variables(named), read_weight(named)
        messages, untrained = [turn.message for turn in turns], _untrained(turns, row.place, self.settings)
        renamed = frozenset(named.renamed)
        return Conversation(row.place, messages, untrained, variables, weight, named.left(), renamed)

    def _turns(self, row: NamedRow) -> list[Turn]:
        if self.columns == ("messages",):
            return read_turns(row, "messages")
        if self.columns == ("conversations",):
            return read_turns(row, "conversations", ("from", "value"))
        question, answer = self.columns
        return [*read_question(row, question), *read_answer(row, answer)]


def find_format(row: Row, settings: RowSettings) -> Format:
    """The first of the known formats whose columns the row has, filled ones before empty ones.

    Raises:
        RowError: If no format fits. The message names the columns of the row, the known formats and a mapping to try.
    """
    columns = NamedRow(row, settings).columns
    filled = {name for name, value in columns.items() if value is not None}
    for present in (filled, columns.keys()):
        for known in FORMATS:
            if present >= set(known):
                return Format(known, settings)
    shown = first_five(map(repr, row.columns)) or "(none)"
    formats = "; ".join(map(" + ".join, FORMATS))
    advice = _advice(row.columns, columns, settings.columns)
    raise RowError(row.place, f"the columns {shown} fit no known format", f". Known formats: {formats}. {advice}")


def _advice(own: Mapping[str, Any], columns: Mapping[str, Any], mapping: Mapping[str, str]) -> str:
    """What to write for the columns of a row that fit no format."""
    if set(PAIRS[-1]) <= columns.keys():
        return "Rows with a chosen and a rejected answer are read by lightning_lora.data.PreferenceDataModule."
    absent = [
        f"columns maps {name!r}, which the row does not have{did_you_mean(name, own)} "
        for name, known in mapping.items()
        if name not in own and known in COLUMNS
    ]
    found = {name: known for name, known in mapping.items() if name in own} | suggest_names(columns)
    if not found:
        return "".join(absent) + "Rename the columns."
    names = ", ".join(f"{name}: {known}" for name, known in found.items())
    option = f"--data.init_args.columns={shlex.quote(json.dumps(found, ensure_ascii=False))}"
    todo = f"Map your names to known ones, for example columns: {{{names}}}. On the command line: {option}"
    return "".join(absent) + todo


def _untrained(turns: Sequence[Turn], place: str, settings: RowSettings) -> frozenset[int]:
    """Indices of messages of the assistant that are not trained on."""
    answers = [number for number, turn in enumerate(turns) if turn.message["role"] == "assistant"]
    if not answers:
        roles = [turn.message["role"] for turn in turns]
        kind = "the assistant has no turn, so there is nothing to train on"
        raise RowError(place, kind, f"; the roles are {roles}.")
    excluded = {number for number in answers if not turns[number].trained}
    return frozenset(excluded | set(answers[:-1]) if settings.train_on == "last answer" else excluded)
