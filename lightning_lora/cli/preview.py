"""``lightning-lora preview``: the first rows as the model sees them, what is trained in them, and what is not used."""

from __future__ import annotations

import sys
import unicodedata
import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.text import Text

from lightning_lora.cli.escapes import acts_on_terminal, escaped
from lightning_lora.cli.quiet import tell_infos
from lightning_lora.data.prompts.data_module import PromptDataModule, PromptRow
from lightning_lora.data.rows_module import RowsDataModule
from lightning_lora.data.split import SplitStatistics
from lightning_lora.data.tokenizer import find_tokenizer
from lightning_lora.errors import CommandError

ROWS = 3
"""Number of rows that are shown."""
HEAD, TAIL = 250, 150
"""Tokens shown of a longer row, from its beginning and from its end."""
_MARK = "trained | "
_TRAINED, _SPECIAL = "bold green", "dim"

Segment = tuple[str, bool]
"""Text of neighbouring tokens, and whether they are trained on."""


def preview_data(trainer: Trainer, data: LightningDataModule | None) -> None:
    """Read the data as ``fit`` does, and show the first rows and the counts of each split. No weights are loaded.

    Args:
        trainer: A Trainer with the module whose tokenizer and vocabulary count.
        data: The data module of the run.

    Raises:
        ConfigError: If the data module is not one of ours, which have rows to show.
        DataError: If a file or a row cannot be used.
    """
    if not isinstance(data, (RowsDataModule, PromptDataModule)):
        kind = "none is given" if data is None else f"it is {type(data).__name__}"
        raise CommandError(
            f"preview shows the rows of the data modules of lightning_lora.data, but as data module {kind}."
        )
    notes = _set_up(trainer, data)
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if isinstance(data, PromptDataModule):
        _show_prompts(console, find_tokenizer(data.tokenizer, trainer.lightning_module), data)
    else:
        tokenizer = data._find_tokenizer()
        for name, row in data.first_rows(ROWS):
            show_row(console, tokenizer, row, name)
    if isinstance(data, PromptDataModule):
        for split, rows in data.rows.items():
            console.print(_summary_of_prompts(split, rows))
    else:
        for split, counts in data.statistics.items():
            console.print(_summary(split, counts, data.settings.max_length))
    for note in notes:
        console.print("note: " + "\n".join(map(_printable, note.splitlines())))


def show_row(console: Console, tokenizer: Any, row: dict[str, Any], name: str) -> None:
    """Print the tokens of a row as text, one line of output for each line of it; trained text has a mark before it.

    Line breaks are shown as a sign, special tokens as their text, control characters as escapes.

    Args:
        console: Where to print; without colours the mark alone tells what is trained.
        tokenizer: The tokenizer that made the row.
        row: ``input_ids``, ``supervised``, ``length`` before cutting, and ``place``.
        name: What to call the row.
    """
    tokens, trained = len(row["input_ids"]), sum(map(bool, row["supervised"]))
    cut = f" (cut, {row['length'] - tokens} more are left out)" if row["length"] > tokens else ""
    console.print(f"{name}, {_printable(row['place'])}: {tokens} tokens{cut}, {trained} trained", style="bold")
    special = [token for token in tokenizer.all_special_tokens if token.strip()]
    for text, is_trained in _shortened(tokenizer, row["input_ids"], row["supervised"]):
        for line in _lines(text):
            shown = Text(line, style=_TRAINED if is_trained else "")
            shown.highlight_words(special, _SPECIAL)
            console.print(Text(_MARK if is_trained else " " * (len(_MARK) - 2) + "| ") + shown)
    console.print()


def _show_prompts(console: Console, tokenizer: Any, data: PromptDataModule) -> None:
    """Print the first prompts, and what else a reward is given."""
    for number, prompt in enumerate(data.rows["train"][:ROWS], start=1):
        ids = prompt.input_ids
        row = {"input_ids": ids, "supervised": [False] * len(ids), "length": len(ids), "place": prompt.place}
        show_row(console, tokenizer, row, f"prompt {number}")
        for name, value in prompt.columns.items():
            console.print(_printable(f"{name}: {value!r}"))
        console.print()


def segments(tokenizer: Any, ids: Sequence[int], supervised: Sequence[bool]) -> list[Segment]:
    """Decode a row of tokens: the text of neighbouring tokens that are all trained on, or all not.

    Joined together, the segments are the text of the whole row: a decoder may write a token in another way at the
    beginning of a text.
    """
    found, start, before = [], 0, ""
    for is_trained, group in groupby(map(bool, supervised)):
        start += len(list(group))
        text = tokenizer.decode(list(ids[:start]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # A character of which the next segment holds the last bytes belongs to that one.
        text = text.rstrip("\ufffd") if start < len(ids) else text
        found.append((text[len(before) :], is_trained))
        before = text
    return [segment for segment in found if segment[0]]


def _set_up(trainer: Trainer, data: LightningDataModule) -> list[str]:
    """Set up the data as a Trainer does; the warnings of it, each once."""
    trainer.state.fn = TrainerFn.FITTING
    data.trainer = trainer
    tell_infos(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.prepare_data()
        data.setup("fit")
    ours = (warning for warning in caught if warning.category is UserWarning)
    return list(dict.fromkeys(str(warning.message) for warning in ours))


def _shortened(tokenizer: Any, ids: Sequence[int], supervised: Sequence[bool]) -> list[Segment]:
    """The segments of a row, or of the beginning and the end of a long one."""
    left_out = len(ids) - HEAD - TAIL
    if left_out <= 0:
        return segments(tokenizer, ids, supervised)
    between = [(f"... {left_out} tokens are not shown ...", False)]
    head = segments(tokenizer, ids[:HEAD], supervised[:HEAD])
    return head + between + segments(tokenizer, ids[-TAIL:], supervised[-TAIL:])


def _lines(text: str) -> list[str]:
    sign = _encodable("\u23ce", "\\n")
    lines = [f"{line}{sign}" for line in text.split("\n")]
    lines[-1] = lines[-1].removesuffix(sign)
    return [_printable(line) for line in lines if line]


def _printable(text: str) -> str:
    """``text`` without characters that a terminal obeys or cannot show: these are escaped."""
    return "".join(escaped(character) if _is_hidden(character) else _encodable(character) for character in text)


def _is_hidden(character: str) -> bool:
    # A character without a meaning of its own has no picture that one could read.
    return acts_on_terminal(character) or unicodedata.category(character) in ("Co", "Cn")


def _encodable(character: str, instead: str | None = None) -> str:
    """``character`` if standard output can write it, else ``instead`` or its escape."""
    try:
        character.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return escaped(character) if instead is None else instead
    return character


def _summary(split: str, counts: SplitStatistics, max_length: int) -> str:
    share = counts.supervised_tokens / counts.tokens
    cut = f"{counts.truncated_rows:,} rows cut at max_length={max_length} (the longest has {counts.longest:,} tokens)"
    used = f"{counts.rows:,} rows, {counts.tokens:,} tokens, {counts.supervised_tokens:,} trained ({share:.1%})"
    return f"{split}: {used}; {cut}"


def _summary_of_prompts(split: str, rows: Sequence[PromptRow]) -> str:
    lengths, columns = [len(row.input_ids) for row in rows], dict.fromkeys(name for row in rows for name in row.columns)
    given = f"a reward is given {', '.join(columns)}" if columns else "no further columns"
    return f"{split}: {len(rows):,} prompts, {sum(lengths):,} tokens, the longest has {max(lengths):,}; {given}"


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments of ``fit`` for those of ``preview``, which may be short: ``DATA... --model FOLDER``.

    Args:
        arguments: What follows ``preview`` on the command line.

    Raises:
        ConfigError: If data is named, but neither a model nor a config with one.
    """
    options, files, rest = [], [], list(arguments)
    while rest:
        word = rest.pop(0)
        takes_value = word.startswith("-") and "=" not in word and word not in ("-h", "--help", "--print_config")
        if word.startswith("-"):
            options.append([word, rest.pop(0)] if takes_value and rest else word.split("=", 1))
        else:
            files.append(word)
    if not files:
        return list(arguments)
    data = [f"--data.init_args.train={files[0] if len(files) == 1 else list(files)}"]
    models = [option[1] for option in options if option[0] == "--model" and len(option) == 2]
    others = ["=".join(option) for option in options if option[0] != "--model"]
    if any(option[0] in ("-c", "--config") for option in options):
        return [*others, *(f"--model.init_args.model={model}" for model in models[-1:]), *data]
    if not models and not {"-h", "--help"} & set(arguments):
        raise CommandError(
            f"preview of {files[0]} needs a tokenizer: add --model FOLDER (or a hub name), or --config FILE."
        )
    classes = ["--model=lightning_lora.tasks.CausalLM", "--data=lightning_lora.data.SFTDataModule"]
    return [*classes, *(f"--model.init_args.model={model}" for model in models[-1:]), *data, *others]
