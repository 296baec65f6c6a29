"""A picture of the losses of a run."""

from __future__ import annotations

from pathlib import Path

from lightning_lora.files.atomic import atomic_file
from lightning_lora.study.report.runs.losses import LossCurve, smoothed


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
