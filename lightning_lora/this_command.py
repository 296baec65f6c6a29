"""The command that has started this process, as it is typed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def program() -> str:
    """The name of the program: ``lightning-lora``, or that of a script."""
    called = Path(sys.argv[0])
    return "lightning-lora" if called.parent.name == "lightning_lora" else called.name


def this_command(ckpt_path: str | None = None) -> str:
    """The command, ready to be pasted.

    Args:
        ckpt_path: A checkpoint to go on from, in place of the one that was given; None leaves the command as it was.
    """
    words = sys.argv[1:]
    if ckpt_path is not None:
        words = [*_without(words, "--ckpt_path"), "--ckpt_path", ckpt_path]
    started = ["lightning-lora"] if program() == "lightning-lora" else ["python", sys.argv[0]]
    return shlex.join([*started, *words])


def _without(words: list[str], option: str) -> list[str]:
    """The words but for an option and its value."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == option:
            next(rest, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept
