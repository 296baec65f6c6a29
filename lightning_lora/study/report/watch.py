"""Keeps the report of a run or study up to date while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lightning_lora.study.report.content import Page
from lightning_lora.study.report.runs.run_record import is_running
from lightning_lora.study.report.write import HTML, find_subject, write_report

SECONDS = 10
"""Between two looks, and between two readings of an open page."""


def watch(folder: Path, tell: Callable[[str], None] = print, seconds: int = SECONDS) -> tuple[Path, Page]:
    """Write the report again whenever files of the folder change, until the run or study has ended.

    An open page reads its own file again every ten seconds, and can be paused. The last page does not.

    Args:
        seconds: Seconds between two looks.

    Returns:
        The folder with the report, and what it says at the end.

    Raises:
        DataError: If there is no run and no study, more than one run, or a damaged file.
    """
    folder = find_subject(folder)
    seen: object = None
    while True:
        if (now := _state(folder)) != seen:
            _, page = write_report(folder, seconds)
            if not page.state:
                return write_report(folder)
            if seen is None:
                tell(f"watching: open {folder / HTML}; Ctrl-C ends the watch, not the run")
            seen = now
        time.sleep(seconds)


def _state(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of what a report is made from, and whether a live process holds the folder."""
    files = [path for pattern in ("*.csv", "*.json*", "*.yaml", "runs/*/curve.csv") for path in folder.glob(pattern)]
    found = [(path, path.stat()) for path in sorted(files) if not path.name.startswith("report.")]
    return [("", int(is_running(folder)), 0), *((str(path), info.st_size, info.st_mtime_ns) for path, info in found)]
