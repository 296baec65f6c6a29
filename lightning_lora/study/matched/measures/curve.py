"""``curve.csv``: the losses of a run against steps, tokens and seconds."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from lightning_lora.files.atomic import write_text

CURVE = "curve.csv"
_VALIDATION = re.compile(r"val(id(ation)?)?([_/.-].*)?[_/.-]?loss")


@dataclass(frozen=True)
class CurvePoint:
    """A line of ``curve.csv``.

    Args:
        step: Optimizer steps so far.
        tokens: Supervised tokens trained on so far; rows where the batches have no tokens.
        seconds: Seconds of training so far, without validation.
        train_loss: Loss of the step, the mean over its micro-batches; None at a validation.
        val_loss: Validation loss after the step; None at other steps.
    """

    step: int
    tokens: int
    seconds: float
    train_loss: float | None
    val_loss: float | None


def write_curve(path: Path, points: Iterable[CurvePoint]) -> None:
    """Write ``curve.csv``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(CurvePoint))
    for point in points:
        step, tokens, seconds, *losses = astuple(point)
        writer.writerow([step, tokens, f"{seconds:.3f}", *("" if loss is None else repr(loss) for loss in losses)])
    write_text(path, text.getvalue())


def read_curve(path: Path) -> tuple[CurvePoint, ...]:
    """The lines of ``curve.csv``; none if there is no such file."""
    if not path.is_file():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(
            CurvePoint(
                int(row["step"]),
                int(row["tokens"]),
                float(row["seconds"]),
                *(float(row[name]) if row[name] else None for name in ("train_loss", "val_loss")),
            )
            for row in csv.DictReader(file)
        )


def validation_metric(names: Iterable[str]) -> str | None:
    """The logged metric that is a validation loss: ``val_loss`` before ``valid/loss`` or ``val_ce_loss``; None without.

    >>> validation_metric(["train_loss", "val_ce_loss", "val_loss"]), validation_metric(["value_loss"])
    ('val_loss', None)
    """
    fitting = (name for name in names if _VALIDATION.fullmatch(name.lower()))
    return min(fitting, key=lambda name: (name != "val_loss", len(name)), default=None)
