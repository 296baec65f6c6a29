"""What scripts write into the folder of a finding: a CSV whose lines may come one by one, and a picture."""

from __future__ import annotations

import argparse
import csv
import io
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lightning_lora.files.atomic import atomic_file
from lightning_lora.versions import installed_version

FINDINGS = Path("docs", "findings")


def read_lines(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file anew, whole or not at all; numbers keep all digits."""
    lines = list(lines)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table for a page."""
    lines = [list(columns), ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def made_with(seconds: float, device: str = "") -> str:
    """A sentence about date, versions, machine and time."""
    versions = ", ".join(f"{name} {installed_version(name)}" for name in ("lightning-lora", "torch", "lightning"))
    where = device or f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    return f"{datetime.now(timezone.utc):%Y-%m-%d}, {versions}, {where}, {seconds:.0f} s."


def run_laws(doc: str | None, name: str, laws: Callable[[], Iterable[Mapping[str, Any]]], digits: int) -> None:
    """The command of a script that compares what it finds with laws: prints the table, and writes the CSV.

    Args:
        doc: The script's own description.
        name: Name of the finding.
        laws: Makes the lines of the table.
        digits: Significant digits to print; the CSV has all.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=FINDINGS / name)
    options = parser.parse_args()
    start = time.perf_counter()
    lines = list(laws())
    write_lines(options.out / "results.csv", lines)
    rows = [[f"{each:.{digits}g}" if isinstance(each, float) else each for each in line.values()] for line in lines]
    table = markdown_table(("law", "case", "found", "the law says"), rows)
    print(table, made_with(time.perf_counter() - start), sep="\n\n")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
