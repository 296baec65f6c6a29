"""``events.jsonl``: what monitors saw, one JSON object a line, in the folder of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAME = "events.jsonl"


def write_event(folder: Path, event: Mapping[str, Any]) -> None:
    """Append one event; numbers that JSON does not know become null."""
    plain = {name: None if _is_no_number(value) else value for name, value in event.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # One write of one line: a kill leaves at most a last line that `read_events` passes over.
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain) + "\n")


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a run; a last line that was cut off is left out."""
    lines = (folder / NAME).read_text(encoding="utf-8").split("\n")
    # What follows the last line break is no whole line.
    yield from (json.loads(line) for line in lines[:-1])


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
