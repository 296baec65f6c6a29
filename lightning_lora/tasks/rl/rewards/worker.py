"""The process that scores: it reads calls of a reward from its input and writes an answer to each.

It is run as a file, not as a module of this package, so that it starts with the standard library alone: what takes
time are the imports of the reward.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

Reward = Callable[..., Sequence[float]]
"""``reward(prompts, completions, **columns) -> rewards``, each argument a list with an entry per row."""

LENGTH = struct.Struct("<I")
"""Stands before each answer: its bytes."""
_LINGER = 5
"""Seconds after its time limit in which a call ends even if nobody is left who would end it."""


class Call(NamedTuple):
    """What one call of a reward is given.

    Args:
        prompts: Texts or lists of messages.
        completions: Texts or lists of messages.
        columns: Further arguments, each with an entry per row.
    """

    prompts: list[Any]
    completions: list[Any]
    columns: Mapping[str, list[Any]]


Answer = list[float] | tuple[int, str]
"""A finite reward of each row; or the row of the call that has none, and why."""


def answer(reward: Callable[..., Any], call: Call) -> Answer:
    """Call a reward and check what it returns."""
    try:
        found: Any = reward(prompts=call.prompts, completions=call.completions, **call.columns)
        if getattr(found, "requires_grad", False):
            return 0, "returned a tensor that requires gradients; return found.tolist()"
        # Arrays and tensors have `tolist`; texts and dicts are sequences too, but of no numbers.
        rewards = found.tolist() if hasattr(found, "tolist") else found
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return 0, f"raised {type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
    if not isinstance(rewards, list | tuple):
        return 0, f"returned {_shown(found)}; return a list with a number for each row"
    if len(rewards) != len(call.prompts):
        return 0, f"returned {len(rewards)} rewards for {len(call.prompts)} row{'s' * (len(call.prompts) != 1)}"
    return _checked(rewards)


def _checked(rewards: Sequence[Any]) -> Answer:
    numbers: list[float] = []
    for row, value in enumerate(rewards):
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, int | float) or not math.isfinite(value):
            return row, f"returned {_shown(value)}; a reward is a finite number"
        numbers.append(float(value))
    return numbers


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _serve() -> None:
    """Answer until the input ends."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(2, 1)  # a reward that prints must not print into an answer
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with suppress(EOFError, BrokenPipeError):
        sys.path[:] = pickle.load(calls)
        limit = pickle.load(calls)
        try:
            reward = pickle.load(calls)
        except Exception as error:
            _write(answers, f"{type(error).__name__}: {error}")
            return
        _write(answers, None)
        while True:
            for call in pickle.load(calls):
                if limit is not None:
                    signal.alarm(math.ceil(limit) + _LINGER)
                found = answer(reward, Call(*call))
                signal.alarm(0)
                _write(answers, found)


def _write(file: int, message: Answer | str | None) -> None:
    data = pickle.dumps(message)
    data = LENGTH.pack(len(data)) + data
    while data:
        data = data[os.write(file, data) :]


if __name__ == "__main__":
    _serve()
