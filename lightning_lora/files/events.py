"""``events.jsonl``: what monitors saw, one JSON object a line, in the folder of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

NAME = "events.jsonl"


def write_event(folder: Path, event: Mapping[str, Any]) -> None:
    """Append one event; numbers that JSON does not know become null."""
    plain = {name: None if _is_no_number(value) else value for name, value in event.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("ab+") as file:
        _drop_cut_line(file)
        file.write(json.dumps(plain).encode() + b"\n")


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a run, of all its attempts; a last line that was cut off is left out."""
    lines = (folder / NAME).read_text(encoding="utf-8").split("\n")
    # What follows the last line break is no whole line.
    yield from (json.loads(line) for line in lines[:-1])


def _drop_cut_line(file: BinaryIO) -> None:
    """What a killed process wrote of its last line must not become the beginning of the next."""
    size = file.seek(0, 2)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, 2)


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
