"""What the curves of runs with rewards say: accuracy at the end, differences between arms, and a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

from lightning_lora.study.statistics.crossed import paired_interval
from studies.modules.digits import HELD_OUT
from studies.modules.pages import markdown_table, save_figure

Lines = Sequence[dict[str, str]]

FULL = "full"
SAMPLED, GREEDY = "val_reward", "val_reward_greedy"
PAIRS = (
    ("r1+head", FULL),
    ("r8+head", FULL),
    ("r1+head", "r8+head"),
    ("r1", FULL),
    ("r1+head", "r1"),
    ("r8+head", "r8"),
)
"""Arms that are compared: the first against the second."""


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        control: ``none`` for rewards of right answers.
        arm: What is trained.
        rate: Learning rate of what is trained.
        seed: Of the run.
        lines: Its evaluations, in the order of steps.
    """

    control: str
    arm: str
    rate: float
    seed: int
    lines: Lines

    def curve(self, name: str) -> list[tuple[int, float]]:
        """The steps at which ``name`` was measured, and what was found."""
        return [(int(line["step"]), float(line[name])) for line in self.lines if line[name]]

    def score(self, name: str) -> float:
        """The mean of the evaluations in the last third of the steps, which is less noisy than the last one."""
        curve = self.curve(name)
        last, _ = curve[-1]
        return fmean(value for step, value in curve if 3 * step >= 2 * last)

    def change(self, name: str) -> tuple[float, float]:
        """What an accuracy has gained from the first to the last evaluation, and the standard error of that.

        The error is that of a difference of two binomial shares.
        """
        curve = self.curve(name)
        (_, start), (_, end) = curve[0], curve[-1]
        return end - start, math.sqrt((start * (1 - start) + end * (1 - end)) / HELD_OUT)


def runs_of(lines: Lines) -> list[Run]:
    """The runs of a CSV file."""
    groups: dict[tuple[str, str, float, int], list[dict[str, str]]] = {}
    for line in lines:
        groups.setdefault((line["control"], line["arm"], float(line["rate"]), int(line["seed"])), []).append(line)
    return [Run(*key, group) for key, group in groups.items()]


def best_rate(runs: Sequence[Run], arm: str) -> tuple[float, bool]:
    """Of the rates with the most seeds that with the highest sampled score on the first seed.

    Returns:
        The rate, and whether lower and higher ones were tried.
    """
    mine = [run for run in runs if (run.control, run.arm) == ("none", arm)]
    seed = min(run.seed for run in mine)
    seeds = Counter(run.rate for run in mine)
    scores = {run.rate: run.score(SAMPLED) for run in mine if run.seed == seed}
    best = max(scores, key=lambda rate: (seeds[rate], scores[rate]))
    return best, min(scores) < best < max(scores)


def at_best(runs: Sequence[Run], arm: str) -> dict[int, Run]:
    """The runs of an arm at its best rate, by seed."""
    rate, _ = best_rate(runs, arm)
    return {run.seed: run for run in runs if (run.control, run.arm, run.rate) == ("none", arm, rate)}


def arms_of(runs: Sequence[Run]) -> list[str]:
    """Arms that learn from rewards of right answers: full, and then the smallest first."""
    sizes = {run.arm: int(run.lines[0]["trained"]) for run in runs if run.control == "none"}
    return sorted(sizes, key=lambda arm: (arm != FULL, sizes[arm]))


def runs_table(lines: Lines) -> str:
    """A line for each run that learns from rewards of right answers; the best rate of an arm is bold."""
    runs = runs_of(lines)
    rows = []
    for arm in arms_of(runs):
        best, _ = best_rate(runs, arm)
        mine = [run for run in runs if (run.control, run.arm) == ("none", arm)]
        for run in sorted(mine, key=lambda run: (run.seed, run.rate)):
            size, bits = int(run.lines[0]["trained"]), float(run.lines[0]["bits"])
            rate = f"**{run.rate:g}**" if run.rate == best else f"{run.rate:g}"
            entropy = run.curve("entropy")[-1][1]
            rows.append((arm, f"{size:,}", rate, run.seed, *_accuracies(run), f"{entropy:.3f}", f"{bits / size:.2f}"))
    columns = ("arm", "parameters", "rate of Adam", "seed", *_COLUMNS, "entropy, nats a token", "bits a parameter")
    return markdown_table(columns, rows)


def controls_table(lines: Lines) -> str:
    """A line for each control, and what its start was."""
    chosen = [run for run in runs_of(lines) if run.control != "none"]
    rows = [
        (run.control, run.arm, f"{run.rate:g}", run.seed, *_accuracies(run), _change([run]))
        for run in sorted(chosen, key=lambda run: (run.control, run.seed))
    ]
    return markdown_table(("control", "arm", "rate of Adam", "seed", *_COLUMNS, "sampled, change"), rows)


def shuffled_table(lines: Lines) -> str:
    """Right and shuffled rewards at the same rates: a line for each seed, and one for all seeds of a rate."""
    runs = runs_of(lines)
    rows = []
    for arm, rate in sorted({(run.arm, run.rate) for run in runs}):
        mine = [run for run in runs if (run.arm, run.rate) == (arm, rate)]
        right, shuffled = (
            {run.seed: run for run in mine if run.control == control} for control in ("none", "shuffled")
        )
        for group in [[seed] for seed in sorted(shuffled)] + ([sorted(shuffled)] if len(shuffled) > 1 else []):
            found = [shuffled[seed] for seed in group]
            mean, error = _mean_change(found, SAMPLED)
            stays = (_change(found), "yes" if abs(mean) <= 2 * error else "no", _change(found, GREEDY))
            learns = ("not run", "", "")
            if right.keys() >= set(group):
                rewarded = [right[seed] for seed in group]
                mean, error = _mean_change(rewarded, SAMPLED)
                learns = (_change(rewarded), "yes" if mean > 2 * error else "no", _change(rewarded, GREEDY))
            rows.append((arm, f"{rate:g}", group[0] if len(group) == 1 else "mean", *learns, *stays))
    columns = ("arm", "rate of Adam", "seed", "right rewards: sampled, change", "above 2 s.e.", "greedy, change")
    return markdown_table((*columns, "shuffled: sampled, change", "within 2 s.e.", "greedy, change"), rows)


def gaps_table(lines: Lines) -> str:
    """Differences between arms at their best rates, paired by seed, sampled and greedy."""
    runs = runs_of(lines)
    rows = []
    there = arms_of(runs)
    for ours, other in PAIRS:
        if ours not in there or other not in there:
            continue
        first, second = at_best(runs, ours), at_best(runs, other)
        seeds = sorted(first.keys() & second.keys())
        edges = [arm for arm in (ours, other) if not best_rate(runs, arm)[1]]
        found = [
            _gap([first[seed].score(name) - second[seed].score(name) for seed in seeds]) for name in (SAMPLED, GREEDY)
        ]
        remark = f"at an edge of the grid: {', '.join(edges)}" if edges else "interior"
        rows.append((f"{ours} - {other}", len(seeds), *found, remark))
    columns = ("arms", "seeds", "sampled, difference (s.e.; 90 % interval)", "greedy, the same", "best rates")
    return markdown_table(columns, rows)


def draw(lines: Lines, path: Path) -> None:
    """Sampled and greedy accuracy of every arm at its best rate, a thin line a seed, and the score against the rate."""
    runs = runs_of(lines)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    sampled, greedy, rates = figure.subplots(1, 3)
    for place, arm in enumerate(arms_of(runs)):
        color = f"C{place}"
        for axes, name in ((sampled, SAMPLED), (greedy, GREEDY)):
            curves = [dict(run.curve(name)) for run in at_best(runs, arm).values()]
            for curve in curves:
                axes.plot(list(curve), list(curve.values()), color=color, lw=0.6, alpha=0.5)
            steps = list(curves[0])
            axes.plot(steps, [fmean(curve[step] for curve in curves) for step in steps], color=color, label=arm)
        first = min(run.seed for run in runs)
        mine = [run for run in runs if (run.control, run.arm, run.seed) == ("none", arm, first)]
        points = sorted((run.rate, run.score(SAMPLED)) for run in mine)
        rates.plot(*zip(*points, strict=True), color=color, marker="o", label=arm)
    for axes, title in ((sampled, "sampled accuracy"), (greedy, "greedy accuracy"), (rates, "sampled score, seed 0")):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    rates.set_xscale("log")
    rates.set_xlabel("rate of Adam")
    sampled.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


_COLUMNS = ("sampled: start", "score", "end", "greedy: start", "score", "end")


def _accuracies(run: Run) -> list[str]:
    found = []
    for name in (SAMPLED, GREEDY):
        curve = run.curve(name)
        found += [f"{value:.3f}" for value in (curve[0][1], run.score(name), curve[-1][1])]
    return found


def _mean_change(runs: Sequence[Run], name: str) -> tuple[float, float]:
    """The mean change of an accuracy of runs, and its standard error."""
    changes, errors = zip(*(run.change(name) for run in runs), strict=True)
    return fmean(changes), math.hypot(*errors) / len(runs)


def _change(runs: Sequence[Run], name: str = SAMPLED) -> str:
    mean, error = _mean_change(runs, name)
    return f"{mean:+.3f} (s.e. {error:.3f})"


def _gap(differences: Sequence[float]) -> str:
    if len(differences) < 2:
        return f"{differences[0]:+.3f} (one seed)"
    found, error = paired_interval(differences), stdev(differences) / math.sqrt(len(differences))
    return f"{found.mean:+.3f} ({error:.3f}; {found.low:+.3f} to {found.high:+.3f})"
