"""An axis of a chart: where a value is, and which values are written at it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from lightning_lora.study.report.numbers import tidy


@dataclass(frozen=True)
class Axis:
    """An axis.

    Args:
        label: What it shows, with its unit.
        low: Its lower end.
        high: Its upper end.
        is_log: Whether equal ratios have equal lengths.
        marks: The values that are written at it; empty: round ones.
    """

    label: str
    low: float
    high: float
    is_log: bool = False
    marks: tuple[float, ...] = ()

    @classmethod
    def around(cls, label: str, values: Iterable[float], is_log: bool = False, margin: float = 0.04) -> Axis:
        """An axis that holds all finite values, and on a logarithmic one all positive ones.

        >>> Axis.around("nats", [1.0, 2.0], margin=0.1)
        Axis(label='nats', low=0.9, high=2.1, is_log=False, marks=())
        """
        fit = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)] or [1.0]
        low, high = min(fit), max(fit)
        if is_log:
            room = (high / low) ** margin if high > low else 2.0
            return cls(label, low / room, high * room, True)
        room = margin * (high - low) or 0.05 * abs(high) or 1.0
        return cls(label, low - room, high + room)

    def marked(self, values: Iterable[float], most: int = 8) -> Axis:
        """The same with these values written at it, if they are few."""
        found = tuple(sorted(set(values)))
        return replace(self, marks=found) if len(found) <= most else self

    def place(self, value: float) -> float:
        """0 at the lower end, 1 at the upper; NaN where the axis has no such place."""
        if not math.isfinite(value) or (self.is_log and value <= 0):
            return math.nan
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Round values on the axis with their texts, at most about ``most``."""
        if self.marks:
            return [(value, tidy(value)) for value in self.marks if self.low <= value <= self.high]
        values = self._log_ticks(most) if self.is_log else []
        values = values if len(values) > 1 else self._even_ticks(most)
        values = [value for value in values if self.low <= value <= self.high]
        texts = [tidy(value) for value in values]
        if len(set(texts)) < len(texts):
            places = math.ceil(-math.log10(min(second - first for first, second in pairwise(values))) - 1e-9)
            texts = [f"{value:,.{max(0, places)}f}" for value in values]
        return list(zip(values, texts, strict=True))

    def _even_ticks(self, most: int) -> list[float]:
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / most))
        step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if span / step <= most)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        # Through the decimal text: 3 * 0.1 is not 0.3.
        return [float(f"{number * step:.12g}") for number in range(first, last + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            values = [float(f"{digit}e{power}") for power in powers for digit in digits]
            values = [value for value in values if self.low <= value <= self.high]
            if len(values) <= most:
                return values
        return values[:: math.ceil(len(values) / most)]
