"""What a command is, and its parser: errors of one line, help with an example."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from lightning_lora.errors import did_you_mean, with_code


@dataclass(frozen=True)
class Command:
    """A command: one line of help, an example, its arguments, and what it does with them."""

    help: str
    example: str
    configure: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]


class CommandParser(ArgumentParser):
    """An argument parser whose errors are one line, with the nearest option and an example."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        _, is_unknown, words = message.partition("unrecognized arguments: ")
        near = did_you_mean(words.split()[0].partition("=")[0], self.options()) if is_unknown else "."
        print(f"error: {with_code(f'{message}{near} {self.epilog}')}", file=sys.stderr)
        raise SystemExit(2)

    def options(self) -> list[str]:
        """The names of all options, such as ``--out``."""
        return [option for action in self._actions for option in action.option_strings]
