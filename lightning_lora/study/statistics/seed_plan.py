"""How many seeds a study runs, and what it costs to add seeds until the answer is clear.

Looking again after more seeds is another chance to be wrong. With looks at 3, 5 and 8 seeds at level .02 each, every
kind of error stays below .05; with .05 each, false "matches" reached .088 and false "falls behind" .106.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_lora.errors import StatisticsError
from lightning_lora.study.statistics.interval import ALPHA


@dataclass(frozen=True)
class SeedPlan:
    """The numbers of seeds after which a study looks at its verdicts, and the level of each look.

    Args:
        looks: Numbers of seeds, ascending.
        alpha: One-sided level of each look.
    """

    looks: tuple[int, ...]
    alpha: float

    @classmethod
    def of(cls, seeds: int | Literal["auto"]) -> SeedPlan:
        """The plan for the setting ``seeds`` of a study: a fixed number, or ``"auto"`` for 3, 5, 8.

        Raises:
            ConfigError: If ``seeds`` is neither.
        """
        if seeds == "auto":
            return cls((3, 5, 8), 0.02)
        if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
            raise StatisticsError(
                f"seeds must be a number of at least 3 for a verdict, or auto for 3, 5, 8, got {seeds!r}."
            )
        return cls((seeds,), ALPHA)
