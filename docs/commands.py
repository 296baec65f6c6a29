"""Write the tables of docs/reference/cli.md from the parsers of the commands.

    python -m docs.commands

tests/test_docs.py fails where the page no longer has the options as they are.
"""

from __future__ import annotations

from argparse import Action, ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from lightning_lora.cli import commands
from lightning_lora.cli.plan import command as plan_command
from lightning_lora.cli.study import command as study_command

PAGE = Path(__file__).parent / "reference" / "cli.md"
BEGIN, END = "<!-- written by python -m docs.commands -->\n", "<!-- end of the tables -->\n"


def tables() -> str:
    """A section for each command with a parser of its own: what it does, an example, its arguments."""
    sections = [section("plan", plan_command.option_parser()), section("study", study_command.option_parser())]
    sections += [section(name, commands.command_parser(name)) for name in commands.COMMANDS]
    return "\n".join(sections)


def section(name: str, parser: ArgumentParser) -> str:
    """The part of the page about one command."""
    example = (parser.epilog or "").rpartition("example: ")[2].split(". Without")[0].rstrip(".")
    lines = [f"### `{name}`", "", str(parser.description), "", "```console", example, "```", ""]
    rows = [f"| {', '.join(spellings(action))} | {said(action)} |" for action in shown(parser)]
    lines += ["| argument | does |", "|---|---|", *rows] if rows else []
    return "\n".join([*lines, ""])


def shown(parser: ArgumentParser) -> Iterator[Action]:
    """The arguments of a command, without ``--help``."""
    return (action for action in parser._actions if action.dest != "help")


def spellings(action: Action) -> Iterator[str]:
    """How an argument is written: a name in capitals, or an option with what follows it."""
    name = str(action.metavar or action.dest.upper())
    after = "" if action.nargs == 0 else f" {name}".replace("|", "\\|")
    return (f"`{option}{after}`" for option in action.option_strings) if action.option_strings else iter([f"`{name}`"])


def said(action: Action) -> str:
    """The help of an argument in a cell of a table."""
    again = " (repeatable)" if type(action).__name__ == "_AppendAction" and "repeatable" not in str(action.help) else ""
    return str(action.help).replace("%%", "%").replace("|", "\\|") + again


def main() -> None:
    """Replace the tables in docs/reference/cli.md."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{tables()}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
