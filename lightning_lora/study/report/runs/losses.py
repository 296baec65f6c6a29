"""The losses of a run by optimizer step, with the tokens and seconds up to then, and the files they are kept in."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from lightning_lora.study.matched.measures.curve import CURVE, CurvePoint, read_curve, validation_metric, write_curve

METRICS = "metrics.csv"
TRAIN = ("train_loss", "train_loss_step")


@dataclass
class LossCurve:
    """Losses of a run.

    Args:
        train: Training loss by optimizer step; the first step is 1.
        validation: Validation loss by the number of optimizer steps before it.
        validation_name: Name of the metric that was logged.
        effort: Supervised tokens (rows, where batches have no tokens) and seconds of training, by optimizer step; only
            for steps where they are known.
    """

    train: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    validation_name: str = "val_loss"
    effort: dict[int, tuple[int, float]] = field(default_factory=dict)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss; None if none is a number."""
        values = {step: value for step, value in self.validation.items() if not math.isnan(value)}
        return min(values.items(), key=lambda item: item[1]) if values else None

    @property
    def last_step(self) -> int:
        """The last step of which there is a loss."""
        return max([*self.train, *self.validation], default=0)

    def up_to(self, step: int) -> LossCurve:
        """The losses before and at an optimizer step."""
        train, validation = (
            {at: loss for at, loss in losses.items() if at <= step} for losses in (self.train, self.validation)
        )
        effort = {at: value for at, value in self.effort.items() if at <= step}
        return LossCurve(train, validation, self.validation_name, effort)

    def described(self) -> str:
        """A few words about the validation loss; an empty text without any."""
        if self.best is None:
            return ""
        (step, best), last = self.best, max(self.validation)
        words = f"best {self.validation_name} {best:.4g} at step {step}"
        return words if last == step else f"{words}, last {self.validation[last]:.4g} at step {last}"

    def write(self, path: Path) -> None:
        """Write ``curve.csv``; steps whose tokens are not known have none there."""
        points = []
        for step in sorted({*self.train, *self.validation}):
            effort = self.effort.get(step, (0, 0.0))
            if step in self.train:
                points.append(CurvePoint(step, *effort, self.train[step], None))
            if step in self.validation:
                points.append(CurvePoint(step, *effort, None, self.validation[step]))
        write_curve(path, points)


def read_losses(folder: Path) -> LossCurve:
    """The losses of a run folder: those of ``curve.csv``, and later ones of ``metrics.csv``.

    Only later ones: where a batch takes several optimizer steps, Lightning counts batches in ``metrics.csv``.
    """
    curve, logged = _read_curve(folder / CURVE), read_metrics(folder / METRICS)
    train, validation = (
        known | {step: loss for step, loss in more.items() if step > max(known, default=0)}
        for known, more in ((curve.train, logged.train), (curve.validation, logged.validation))
    )
    return LossCurve(train, validation, logged.validation_name, curve.effort)


def read_metrics(path: Path) -> LossCurve:
    """The losses in the file of a CSV logger; none if there is no such file."""
    curve = LossCurve()
    if not path.is_file():
        return curve
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            values = {name: value for name, value in row.items() if name and value}
            step = int(values["step"]) + 1  # Lightning counts from 0
            if (name := next(filter(values.get, TRAIN), None)) is not None:
                curve.train[step] = float(values[name])
            if (name := validation_metric(values)) is not None:
                curve.validation[step], curve.validation_name = float(values[name]), name
    return curve


def smoothed(losses: tuple[float, ...]) -> numpy.ndarray:
    """The mean over a step and its neighbours, at least one and a twentieth of all on each side; fewer at both ends.

    >>> smoothed((1.0, 2.0, 6.0)).tolist()
    [1.5, 3.0, 4.0]
    """
    if len(losses) < 3:
        return numpy.array(losses)
    kernel = numpy.ones(2 * max(1, len(losses) // 20) + 1)
    counts = numpy.convolve(numpy.ones(len(losses)), kernel, mode="same")
    return numpy.convolve(losses, kernel, mode="same") / counts


def _read_curve(path: Path) -> LossCurve:
    curve = LossCurve()
    for point in read_curve(path):
        if point.train_loss is not None:
            curve.train[point.step] = point.train_loss
        if point.val_loss is not None:
            curve.validation[point.step] = point.val_loss
        if point.tokens:
            curve.effort[point.step] = (point.tokens, point.seconds)
    return curve
