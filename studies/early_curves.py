"""What rank does early (T1): 50 steps of ranks 1 to 128 at one rate, with alpha / rank and alpha / sqrt(rank).

    PYTHONPATH=. python studies/early_curves.py

Larger: ``--steps``, ``--seeds``, and width in `TinyTask`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from lightning_lora import LoRAConfig
from studies.modules.curves import points_at
from studies.modules.pages import FINDINGS, made_with, markdown_table, save_figure, write_lines

RANKS = (1, 4, 16, 64, 128)
REFERENCE, WINDOW = 64, 10
"""The rank that others are compared with, and the steps that count as early."""
SCALINGS = ("standard", "rslora")
RATE = 1e-3

Curves = dict[tuple[str, int], list[float]]
"""Scaling and rank to the loss after each step, the mean over seeds."""


def measure(seeds: int, steps: int) -> list[dict[str, object]]:
    """A line for each scaling, rank, seed and step."""
    lines: list[dict[str, object]] = []
    for scaling in SCALINGS:
        for rank in RANKS:
            for seed in range(1, seeds + 1):
                lora = LoRAConfig(rank=rank, scaling=scaling)  # pyright: ignore[reportArgumentType]
                found = points_at("text", lora, RATE, seed, range(steps + 1), num_rows=8000)
                lines += (
                    {"scaling": scaling, "rank": rank, "seed": seed, "step": step, "loss": point.loss}
                    for step, point in found.items()
                )
    return lines


def mean_curves(lines: Sequence[Mapping[str, object]]) -> Curves:
    """The mean over seeds."""
    found: dict[tuple[str, int], dict[int, list[float]]] = {}
    for line in lines:
        of_rank = found.setdefault((str(line["scaling"]), int(str(line["rank"]))), {})
        of_rank.setdefault(int(str(line["step"])), []).append(float(str(line["loss"])))
    return {key: [fmean(each[step]) for step in sorted(each)] for key, each in found.items()}


def distances(curves: Curves, scaling: str) -> dict[int, tuple[float, float]]:
    """Rank to its largest distance from rank 64 early, and its distance at the end, as shares of the early drop."""
    reference = curves[scaling, REFERENCE]
    drop = reference[0] - reference[WINDOW]
    return {
        rank: (
            max(abs(a - b) for a, b in zip(curves[scaling, rank][: WINDOW + 1], reference[: WINDOW + 1], strict=True))
            / drop,
            abs(curves[scaling, rank][-1] - reference[-1]) / drop,
        )
        for rank in RANKS
        if rank != REFERENCE
    }


def table(curves: Curves) -> str:
    """Distances by scaling and rank."""
    rows = [
        (scaling, rank, f"{early:.3f}", f"{late:.3f}")
        for scaling in SCALINGS
        for rank, (early, late) in distances(curves, scaling).items()
    ]
    return markdown_table(("scale", "rank", "largest distance in 10 steps", "distance at the end"), rows)


def draw(curves: Curves, path: Path) -> None:
    """A panel for each scaling."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, scaling in zip(figure.subplots(1, 2, sharey=True), SCALINGS, strict=True):
        for rank in RANKS:
            axes.plot(curves[scaling, rank], label=f"rank {rank}")
        axes.set_title("alpha / rank" if scaling == "standard" else "alpha / sqrt(rank)")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("nats, held-out rows")
    figure.axes[0].legend(frameon=False)
    save_figure(figure, path)


def main() -> None:
    """Measure, print the table, and write CSV and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=FINDINGS / "early_curves")
    options = parser.parse_args()
    start = time.perf_counter()
    lines = measure(options.seeds, options.steps)
    write_lines(options.out / "results.csv", lines)
    curves = mean_curves(lines)
    draw(curves, options.out / "curves.png")
    print(table(curves), made_with(time.perf_counter() - start), sep="\n\n")


if __name__ == "__main__":
    main()
