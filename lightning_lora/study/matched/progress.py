"""A line for each finished run: what it was, what came out, and how long the rest will take."""

from __future__ import annotations

from lightning_lora.study.matched.cells import Cell, Outcome
from lightning_lora.study.matched.spec import StudySpec
from lightning_lora.study.statistics.before_start import before_start


class Progress:
    """Speaks of runs as they end, and estimates the time that is left from those that this worker has done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def done(self, cell: Cell, outcome: Outcome, seconds: float, over: int, expected: int) -> str:
        """The line for a run that is done."""
        self.seconds.append(seconds)
        expected = max(expected, over)
        left = (expected - over) * sum(self.seconds) / len(self.seconds)
        rest = f"about {duration(left)} left for one worker" if expected > over else "the last one that is known of"
        loss = outcome.rows.mean(cell.phase)
        return f"{over} of about {expected}: {described(cell)}: loss {loss:.4f}, {duration(seconds)}; {rest}"

    @staticmethod
    def failed(cell: Cell, reason: str) -> str:
        """The line for a run that failed."""
        return f"failed: {described(cell)}: {reason}"


def promises(spec: StudySpec) -> list[str]:
    """Lines to print before a study starts: what it can show."""
    lines = before_start(spec.plan, spec.band)
    if spec.aa:
        count = len(spec.aa_seeds)
        lines.append(f"noise floor: {spec.baseline} runs with {count} other seeds too, and is compared with itself")
    return lines


def described(cell: Cell) -> str:
    """A run in words."""
    if cell.phase == "base":
        return cell.arm
    return f"{cell.arm}, learning rate {cell.learning_rate:g}, seed {cell.seed} ({cell.phase})"


def duration(seconds: float) -> str:
    """A time in words: ``45 s``, ``12 min``, ``3.5 h``.

    >>> duration(45), duration(754), duration(12600)
    ('45 s', '13 min', '3.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
