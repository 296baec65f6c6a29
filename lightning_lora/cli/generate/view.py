"""Answers on a terminal: base and tuned side by side where there is room, and no control characters of a model."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text as StyledText

from lightning_lora.cli.escapes import acts_on_terminal, escaped
from lightning_lora.cli.generate.answers import END_OF_TURN, Answer
from lightning_lora.data.prompts.read_prompts import Prompt
from lightning_lora.data.records import Conversation, Message, Text

SIDE_BY_SIDE = 100
"""Columns of a terminal from which on two answers stand side by side."""
ANSWER, TUNED, BASE, REFERENCE = "answer", "tuned", "base", "reference"
_STYLES = {ANSWER: "bold green", TUNED: "bold green", BASE: "bold blue", REFERENCE: "bold magenta"}
_TAB = "    "


def terminal() -> Console:
    """The standard output: colours on a terminal only, and none under ``NO_COLOR``."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.width:  # of COLUMNS=0, which would leave the answers out
        console.width = 80
    return console


def printable(text: str) -> str:
    r"""Text of a model in which nothing acts on a terminal: control and direction characters as ``\x1b``, ``\u202e``.

    >>> printable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    text = text.replace("\r\n", "\n").replace("\t", _TAB)
    return "".join(escaped(char) if char != "\n" and acts_on_terminal(char) else char for char in text)


def show(console: Console, number: int, prompt: Prompt, tuned: Answer, base: Answer | None = None) -> None:
    """Print a prompt and its answers.

    Args:
        console: Where to print.
        number: Number of the prompt, from 1.
        prompt: The prompt.
        tuned: The answer of the trained model.
        base: The answer of the base; None shows the one answer.
    """
    # Without the folders of the file, which would fill the line.
    place = printable(prompt.record.place.rpartition("/")[2])
    console.rule(StyledText(f"{number}  {place}", "dim"), align="left", style="dim")
    console.print(StyledText(_asked(prompt.record)))
    console.print()
    columns = [_column(ANSWER if base is None else TUNED, tuned.text, _note(tuned))]
    if base is not None:
        columns.insert(0, _column(BASE, base.text, _note(base)))
    if prompt.reference is not None:
        columns.append(_column(REFERENCE, prompt.reference))
    _show_columns(console, columns)


def _show_columns(console: Console, columns: Sequence[StyledText]) -> None:
    if console.width < SIDE_BY_SIDE or len(columns) == 1:
        for column in columns:
            console.print(column)
            console.print()
        return
    table = Table.grid(padding=(0, 3, 0, 0), expand=True)
    for _ in columns:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*columns)
    console.print(table)
    console.print()


def _column(name: str, text: str, note: str = "") -> StyledText:
    column = StyledText(overflow="fold")
    column.append(name, _STYLES[name])
    if note:
        column.append(f"  {note}", "dim")
    return column.append(f"\n{printable(text).strip()}" if text.strip() else "\n(nothing)")


def _note(answer: Answer) -> str:
    stop = answer.stop if answer.stop == END_OF_TURN else f"stopped by {answer.stop}"
    return f"{answer.tokens} tokens, {stop}"


def _asked(record: Conversation | Text) -> str:
    if isinstance(record, Text):
        return printable(record.text)
    if [message["role"] for message in record.messages] == ["user"]:
        return _content(record.messages[0])
    return "\n".join(f"{printable(message['role'])}: {_content(message)}" for message in record.messages)


def _content(message: Message) -> str:
    content = message.get("content")
    others = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    shown = [content if isinstance(content, str) else repr(content)] if content else []
    return printable(" ".join([*shown, *([repr(others)] if others else [])]))
