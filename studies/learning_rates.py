r"""The best learning rate of LoRA against that of full fine-tuning (T2), and how it moves with the length (T7).

    PYTHONPATH=. python studies/learning_rates.py
    PYTHONPATH=. python studies/learning_rates.py --task text --ranks 16 --steps 25 100 400 \
        --out docs/findings/short_runs

The rate is constant, so one run is read at several lengths. A killed run of this script goes on where it was. Larger:
``--seeds``, and ``width`` in `TinyTask`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from lightning_lora import LoRAConfig
from lightning_lora.study.statistics.crossed import paired_interval
from lightning_lora.study.statistics.rates.rate_vertex import vertex
from studies.modules.curves import BATCH, points_at
from studies.modules.pages import FINDINGS, made_with, markdown_table, read_lines, save_figure, write_lines
from studies.modules.rows import TASKS, Task

FULL = "full"
GRID = tuple(float(f"{1e-4 * 2**power:.6g}") for power in range(8))
"""Rates of Adam itself, a factor of 2 apart; each arm is tried at six of them."""
NUM_FACTS = 500


@dataclass(frozen=True)
class Optimum:
    """The best rate of an arm at a length, for one seed.

    Args:
        rate: At the vertex of a parabola through the best rate and its neighbours.
        is_edge: Whether the best rate is the lowest or highest one tried.
    """

    rate: float
    is_edge: bool


def measure(task: Task, arms: Sequence[str], steps: Sequence[int], seeds: int, path: Path) -> list[dict[str, str]]:
    """A line for each arm, rate, seed and length; runs that are in the file with all of these lengths are kept.

    The facts are few and come again and again; a text is seen once.
    """
    lines = read_lines(path)
    num_rows = NUM_FACTS if task == "facts" else BATCH * max(steps)
    for seed in range(1, seeds + 1):
        for arm in arms:
            for rate in GRID[:6] if (task, arm) == ("facts", FULL) else GRID[2:]:
                mine = [line for line in lines if _run_of(line) == (arm, rate, seed)]
                if {int(line["step"]) for line in mine} >= {0, *steps}:
                    continue
                lora = None if arm == FULL else LoRAConfig(rank=int(arm.split()[1]))
                found = points_at(task, lora, rate, seed, [0, *steps], num_rows)
                lines = [line for line in lines if _run_of(line) != (arm, rate, seed)]
                lines += (
                    {
                        "arm": arm,
                        "rate": repr(rate),
                        "seed": str(seed),
                        "step": str(step),
                        "loss": repr(point.loss),
                        "b_over_a": repr(point.b_over_a),
                    }
                    for step, point in found.items()
                )
                write_lines(path, lines)
    return lines


def _run_of(line: dict[str, str]) -> tuple[str, float, int]:
    return line["arm"], float(line["rate"]), int(line["seed"])


def optimum(lines: Sequence[dict[str, str]], arm: str, step: int, seed: int) -> Optimum:
    """The best rate of an arm; losses above that of the untrained base, and NaN, count as that one."""
    mine = [line for line in lines if line["arm"] == arm and int(line["seed"]) == seed]
    base = next(float(line["loss"]) for line in mine if line["step"] == "0")
    losses = {float(line["rate"]): float(line["loss"]) for line in mine if int(line["step"]) == step}
    capped = {rate: base if math.isnan(loss) else min(loss, base) for rate, loss in sorted(losses.items())}
    rates = list(capped)
    best = min(capped, key=lambda rate: capped[rate])
    place = rates.index(best)
    if place in (0, len(rates) - 1):
        return Optimum(best, True)
    low, middle, high = rates[place - 1 : place + 2]
    return Optimum(vertex((low, middle, high), (capped[low], capped[middle], capped[high]))[0], False)


def ratio_row(lines: Sequence[dict[str, str]], arm: str, step: int) -> tuple[str, int, str, str, str, str]:
    """Arm, steps, its best rate, that of full fine-tuning, their ratio with interval, and remarks."""
    seeds = sorted({int(line["seed"]) for line in lines if line["arm"] == arm})
    pairs = [(optimum(lines, arm, step, seed), optimum(lines, FULL, step, seed)) for seed in seeds]
    found = paired_interval([math.log(ours.rate / full.rate) for ours, full in pairs])
    mean, low, high = (math.exp(each) for each in (found.mean, found.low, found.high))
    ours, full = (math.exp(sum(math.log(pair[at].rate) for pair in pairs) / len(pairs)) for at in (0, 1))
    edges = sum(ours.is_edge or full.is_edge for ours, full in pairs)
    remark = f"at the edge of the grid in {edges} of {len(pairs)} seeds" if edges else "interior"
    return arm, step, f"{ours:.2e}", f"{full:.2e}", f"{mean:.2f} ({low:.2f} to {high:.2f})", remark


def table(lines: Sequence[dict[str, str]]) -> str:
    """The ratio of each rank at each length."""
    arms = [arm for arm in dict.fromkeys(line["arm"] for line in lines) if arm != FULL]
    steps = sorted({int(line["step"]) for line in lines} - {0})
    columns = ("arm", "steps", "best rate", "best rate of full", "ratio (90 % interval)", "best rates are")
    return markdown_table(columns, [ratio_row(lines, arm, step) for arm in arms for step in steps])


def norms_table(lines: Sequence[dict[str, str]]) -> str:
    """How large B is beside A after so many steps, at the rate that is best at the last one, mean of seeds."""
    arms = [arm for arm in dict.fromkeys(line["arm"] for line in lines) if arm != FULL]
    steps = sorted({int(line["step"]) for line in lines})
    rows = []
    for arm in arms:
        mine = [line for line in lines if line["arm"] == arm]
        rates = {line["rate"]: _mean(mine, line["rate"], steps[-1], "loss") for line in mine}
        best = min(rates, key=lambda rate: rates[rate])
        rows.append((arm, f"{float(best):.2g}", *(f"{_mean(mine, best, step, 'b_over_a'):.3f}" for step in steps)))
    return markdown_table(("arm", "rate of Adam", *(f"step {step}" for step in steps)), rows)


def _mean(lines: Sequence[dict[str, str]], rate: str, step: int, column: str) -> float:
    found = fmean(float(line[column]) for line in lines if line["rate"] == rate and int(line["step"]) == step)
    return math.inf if math.isnan(found) else found


def draw(lines: Sequence[dict[str, str]], path: Path) -> None:
    """A panel for each length: the mean loss over seeds against the rate."""
    steps = sorted({int(line["step"]) for line in lines} - {0})
    base = float(next(line["loss"] for line in lines if line["step"] == "0"))
    figure = Figure(figsize=(3.4 * len(steps), 3.6), layout="constrained")
    for axes, step in zip(figure.subplots(1, len(steps), squeeze=False)[0], steps, strict=True):
        for arm in dict.fromkeys(line["arm"] for line in lines):
            mine = [line for line in lines if line["arm"] == arm]
            rates = sorted({line["rate"] for line in mine}, key=float)
            losses = [_mean(mine, rate, step, "loss") for rate in rates]
            axes.plot([float(rate) for rate in rates], losses, marker="o", label=arm)
        axes.set_xscale("log")
        axes.set_title(f"{step} steps")
        axes.set_xlabel("rate of Adam")
        axes.grid(alpha=0.3)
        axes.set_ylim(axes.get_ylim()[0], base)
    figure.axes[0].set_ylabel("nats a token")
    figure.axes[0].legend(frameon=False)
    save_figure(figure, path)


def main() -> None:
    """Measure, print the table, and write CSV and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--task", choices=TASKS, default="facts")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 100, 200])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FINDINGS / "learning_rates")
    options = parser.parse_args()
    start = time.perf_counter()
    arms = [FULL, *(f"rank {rank}" for rank in options.ranks)]
    lines = measure(options.task, arms, options.steps, options.seeds, options.out / "results.csv")
    draw(lines, options.out / "rates.png")
    print(table(lines), made_with(time.perf_counter() - start), sep="\n\n")


if __name__ == "__main__":
    main()
