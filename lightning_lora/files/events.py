"""``events.jsonl``: the log of the monitors in the folder of a run, one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

EVENTS_FILE = "events.jsonl"


def write_event(folder: Path, event: Mapping[str, Any]) -> None:
    """Append one event to the log in ``folder``; NaN and infinity, which JSON does not have, become null."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in event.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / EVENTS_FILE).open("ab+") as file:
        _drop_cut_line(file)
        file.write(json.dumps(plain).encode() + b"\n")


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of all attempts of a run, in order; a last line that was cut off is left out."""
    lines = (folder / EVENTS_FILE).read_text(encoding="utf-8").split("\n")
    # The text after the last line break is not a whole line.
    yield from (json.loads(line) for line in lines[:-1])


def _drop_cut_line(file: BinaryIO) -> None:
    """Remove a last line that a killed process wrote in part, and move to the end."""
    size = file.seek(0, 2)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, 2)
