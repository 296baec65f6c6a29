"""The losses of a run by optimizer step, and a picture of them."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from lightning_lora.files.atomic import atomic_file

TRAIN = ("train_loss", "train_loss_step")
_VALIDATION = re.compile(r"val(id(ation)?)?[_/.-]?loss")


@dataclass
class LossCurve:
    """Losses of a run.

    Args:
        train: Training loss by optimizer step; the first step is 1.
        validation: Validation loss by the number of optimizer steps before it.
        validation_name: Name of the metric that was logged.
    """

    train: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    validation_name: str = "val_loss"

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss; None if none is a number."""
        values = {step: value for step, value in self.validation.items() if not math.isnan(value)}
        return min(values.items(), key=lambda item: item[1]) if values else None

    def up_to(self, step: int) -> LossCurve:
        """The losses before and at an optimizer step."""
        train, validation = (
            {at: loss for at, loss in losses.items() if at <= step} for losses in (self.train, self.validation)
        )
        return LossCurve(train, validation, self.validation_name)

    def described(self) -> str:
        """A few words about the validation loss; an empty text without any."""
        if self.best is None:
            return ""
        (step, best), last = self.best, max(self.validation)
        words = f"best {self.validation_name} {best:.4g} at step {step}"
        return words if last == step else f"{words}, last {self.validation[last]:.4g} at step {last}"


def validation_metric(names: Iterable[str]) -> str | None:
    """The metric that is a validation loss: ``val_loss`` or a spelling of it such as ``valid/loss``; None without."""
    return min(filter(is_validation, names), key=lambda name: name != "val_loss", default=None)


def is_validation(name: str) -> bool:
    """Whether a metric of this name is a validation loss."""
    return _VALIDATION.fullmatch(name.lower()) is not None


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


def draw(curve: LossCurve, path: Path) -> None:
    """Draw the training loss of each step as a thin line, smoothed as a thick one, and validation as marks."""
    from matplotlib.figure import Figure  # late: the start of a run does not wait for it
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    if curve.train:
        steps, losses = zip(*sorted(curve.train.items()), strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.8, label="train_loss")
        axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.8, label="train_loss, smoothed")
    if curve.validation:
        steps, losses = zip(*sorted(curve.validation.items()), strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", linewidth=1, label=curve.validation_name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=140)


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
