"""Rewards as a user writes them; nothing but the standard library, so that a process starts quickly."""

from __future__ import annotations

import os
import sys
import time
from typing import Any


def exact(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    return [float(found == wanted) for found, wanted in zip(completions, answer, strict=True)]


def lengths(prompts: list[str], completions: list[str]) -> list[float]:
    print("a reward may print")
    return [float(len(completion)) for completion in completions]


def rows_seen(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(prompts))] * len(prompts)


def as_told(prompts: list[str], completions: list[str]) -> Any:
    """Does what the first completion of a call says."""
    told = completions[0]
    if told == "hang":
        time.sleep(60)
    elif told == "spin":
        sum(range(10**12))  # never leaves C
    elif told == "raise":
        raise ZeroDivisionError("of mine")
    elif told == "exit":
        os._exit(7)
    elif told == "stop":
        sys.exit("enough")
    returned = {"nan": [float("nan")], "none": [None], "text": ["1"], "nothing": None, "two": [1.0, 2.0]}
    return returned.get(told, [1.0] * len(completions))
