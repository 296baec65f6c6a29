"""What a capacity monitor has measured, and the verdict that follows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["SPARE", "SATURATED", "UNDETERMINED"]

SPARE_BELOW = 0.02
"""Share of the gain that the lower half of the rank may hold where rank is spare."""
FULL_BELOW = 0.5
"""Tangent capture that full adapters stay below at a low learning rate, with its interval."""
LOW_RATE = 0.1
"""Share of its peak below which a learning rate is low."""
_ROUNDING = 1e-6
"""Schedules that end at a tenth of the peak exactly end a little above it."""
IDLE_BELOW = 0.01
"""Share of the gain that a group of layers without use gives."""
ENOUGH_ROWS = 256
"""Held-out rows for a useful interval."""


FEW_ROWS = 32
"""Scores below which an interval itself is uncertain."""
LOGGED = (
    "rate",
    "bits_per_parameter",
    "base_loss",
    "train_loss",
    "loss",
    "half_loss",
    "bare_loss",
    "truncation",
    "stable_rank",
    "effective_rank",
    "capture",
    "capture_low",
    "capture_high",
)
"""Numbers of a reading that loggers get."""


@dataclass(frozen=True)
class GroupReading:
    """A group of adapted layers.

    Args:
        rank: Mean rank of its updates.
        stable_rank: Their mean stable rank.
        effective_rank: Their mean effective rank.
        share: Share of the gain that is lost without the group; None if there was no gain.
        truncation: Share of the group's own gain that is lost at half of its rank; None where the group is idle.
        capture: Tangent capture; None where it is inconclusive, or not measured.
        capture_high: Upper end of its 95 % interval.
        spectrum: Singular values of its updates, scaled, descending: the mean over its weights of each place.
    """

    rank: float
    stable_rank: float
    effective_rank: float
    share: float | None = None
    truncation: float | None = None
    capture: float | None = None
    capture_high: float | None = None
    spectrum: tuple[float, ...] = ()

    @property
    def state(self) -> Literal["full", "idle", "spare", ""]:
        """``"full"``, ``"idle"`` or ``"spare"`` at a low learning rate; empty where the measurements do not tell."""
        if self.share is not None and self.share < IDLE_BELOW:
            return "idle"
        if self.truncation is None:
            return ""
        if self.truncation < SPARE_BELOW:
            return "spare"
        return "full" if self.capture_high is not None and self.capture_high < FULL_BELOW else ""


@dataclass(frozen=True)
class CapacityReading:
    """The latest measurements of a run; None where a number was not measured, or had no meaning.

    Args:
        step: Optimizer steps done.
        rate: Learning rate of the adapters over its peak so far.
        parameters: Trained parameters.
        tokens: Supervised tokens that an epoch has shown, or rows where there are no tokens; duplicates count.
        base_loss: Loss of training rows before training, nats.
        train_loss: Loss of the same rows now, nats.
        bits_per_parameter: ``tokens * (base_loss - train_loss) / ln 2 / parameters``.
        loss: Loss of held-out rows, nats; of training rows where there are no held-out rows.
        half_loss: The same with all updates cut to half of their rank.
        bare_loss: The same without adapters.
        gain_error: Standard error of ``bare_loss - loss``, nats; infinite for a single score.
        num_scores: Scores behind it: held-out rows, or batches where a module tells no losses of rows.
        is_held_out: Whether the rows are held out, and not training rows.
        stable_rank: Mean stable rank of the updates.
        effective_rank: Mean effective rank of the updates.
        capture: Tangent capture.
        capture_low: Lower end of its 95 % interval.
        capture_high: Upper end.
        capture_rate: ``rate`` when tangent capture was measured.
        num_captured: Adapted weights that tangent capture was measured on: those of linear layers.
        num_weights: All adapted weights.
        no_capture: Why tangent capture cannot be measured; empty if it can.
        groups: Groups of layers by name.
    """

    step: int = 0
    rate: float = 1.0
    parameters: int = 0
    tokens: int | None = None
    base_loss: float | None = None
    train_loss: float | None = None
    bits_per_parameter: float | None = None
    loss: float | None = None
    half_loss: float | None = None
    bare_loss: float | None = None
    gain_error: float | None = None
    num_scores: int = 0
    is_held_out: bool = True
    stable_rank: float | None = None
    effective_rank: float | None = None
    capture: float | None = None
    capture_low: float | None = None
    capture_high: float | None = None
    capture_rate: float | None = None
    num_captured: int = 0
    num_weights: int = 0
    no_capture: str = ""
    groups: Mapping[str, GroupReading] = field(default_factory=dict)

    @property
    def has_gained(self) -> bool:
        """Whether adapters have lowered the loss by more than two standard errors."""
        if self.loss is None or self.bare_loss is None or self.gain_error is None:
            return False
        return self.bare_loss - self.loss > 2 * self.gain_error

    @property
    def truncation(self) -> float | None:
        """Share of the gain that is lost at half of the rank; None if there is no gain. All of it at rank 1."""
        if not self.has_gained:
            return None
        assert self.loss is not None
        assert self.bare_loss is not None
        assert self.half_loss is not None
        return (self.half_loss - self.loss) / (self.bare_loss - self.loss)

    @property
    def is_settled(self) -> bool:
        """Whether the learning rate is low, so that what is left of the gradient is what adapters cannot follow."""
        return _is_low(self.rate)

    @property
    def verdict(self) -> Verdict:
        """``"SPARE"``, ``"SATURATED"`` (likely) or ``"UNDETERMINED"``.

        A verdict needs a low learning rate: at a high one the loss still moves, and full adapters look like others.
        """
        truncation = self.truncation
        if truncation is None or not self.is_settled:
            return "UNDETERMINED"
        if truncation < SPARE_BELOW:
            return "SPARE"
        is_low = self.capture_rate is not None and _is_low(self.capture_rate)
        is_full = self.capture_high is not None and self.capture_high < FULL_BELOW
        return "SATURATED" if is_low and is_full else "UNDETERMINED"

    @property
    def numbers(self) -> dict[str, float]:
        """What loggers get, by name."""
        found = {name: getattr(self, name) for name in LOGGED}
        return {
            f"capacity/{name}": value for name, value in found.items() if value is not None and math.isfinite(value)
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return asdict(self) | {"groups": {name: asdict(group) for name, group in self.groups.items()}}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> CapacityReading:
        """Read what `to_dict` returned."""
        groups = {
            name: GroupReading(**(group | {"spectrum": tuple(group["spectrum"])}))
            for name, group in saved["groups"].items()
        }
        values: dict[str, Any] = {**saved, "groups": groups}
        return cls(**values)

    def sentence(self) -> str:
        """The verdict in one sentence, with the numbers behind it."""
        return f"capacity: {self.verdict_in_words}: {self._reason()}{self._groups()}{self._next()}"

    @property
    def verdict_in_words(self) -> str:
        """The verdict as it is printed."""
        return "SATURATED (likely)" if self.verdict == "SATURATED" else self.verdict

    def _reason(self) -> str:
        if self.loss is None:
            return "nothing was measured"
        if self.truncation is None:
            return self._no_gain()
        half = f"half of the rank loses {self.truncation:.1%} of what the adapters gained{self._rows()}"
        if not self.is_settled:
            return f"{half}, but the learning rate ({self.rate:.0%} of its peak) has not decayed, which hides full ones"
        if self.verdict == "SPARE":
            return half
        if self.no_capture:
            return f"{half}; {self.no_capture.rstrip('.')}"
        some = f" of {self.num_captured} of {self.num_weights} weights" if self.num_captured < self.num_weights else ""
        if self.capture is None or self.capture_high is None:
            return f"{half}; tangent capture{some} cannot be told from noise"
        interval = f"{self.capture:.2f} ({self.capture_low:.2f} to {self.capture_high:.2f})"
        return f"{half}, and tangent capture{some} is {interval} where full adapters stay below {FULL_BELOW}"

    def _no_gain(self) -> str:
        """Why there is no gain to speak of."""
        assert self.loss is not None
        assert self.bare_loss is not None
        if self.gain_error is None or not math.isfinite(self.gain_error):
            return f"a gain from {self.num_scores} loss cannot be told from chance: use {ENOUGH_ROWS} held-out rows"
        return (
            f"the adapters have lowered the loss by {self.bare_loss - self.loss:.4f} +- {2 * self.gain_error:.4f} nats"
            f"{self._rows()}, which is no measurable gain, and failed training looks like full adapters"
        )

    def _rows(self) -> str:
        """What is to be said of the rows behind the losses."""
        if not self.is_held_out:
            return " (by training rows, as there are no validation rows)"
        return f" (by {self.num_scores} held-out losses, which are few)" if self.num_scores < FEW_ROWS else ""

    def _groups(self) -> str:
        if not self.is_settled:
            return ""
        full = [name for name, group in self.groups.items() if group.state == "full"]
        idle = [name for name, group in self.groups.items() if group.state == "idle"]
        parts = [f"{_some(full)} full"] * bool(full) + [f"{_some(idle)} idle"] * bool(idle)
        return f"; {', '.join(parts)}" if parts else ""

    def _next(self) -> str:
        return "." if self.verdict == "SPARE" or self.loss is None else "; a RankProbe shows whether more rank helps."


def _is_low(rate: float) -> bool:
    return rate <= LOW_RATE * (1 + _ROUNDING)


def _some(names: list[str]) -> str:
    if len(names) > 3:
        return f"{', '.join(names[:3])} and {len(names) - 3} more are"
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"


def place_of(name: str) -> tuple[str, str]:
    """Row and column of a group: ``layer 3`` and ``mlp``; a weight that is a group of its own has no column name."""
    row, _, role = name.rpartition(" ")
    return (row, role) if row else (name, "")
