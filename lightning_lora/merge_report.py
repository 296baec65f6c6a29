"""What merging cost: how much of each update survived rounding to the type of its weight."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

# Above this share of an update lost the merged model is worth a second look.
WORTH_A_WARNING = 0.1


@dataclass(frozen=True)
class MergeReport:
    """What `merge_lora` did.

    Args:
        losses: Name of every merged layer to ``|stored change - update| / |update|``, what rounding took of its update;
            0 for weights in float32 or wider.
    """

    losses: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest loss."""
        return max(self.losses.values())

    def __str__(self) -> str:
        name = max(self.losses, key=lambda name: self.losses[name])
        return f"{len(self.losses)} layers merged; rounding took at most {self.worst:.2%} of an update ({name})"

    def warn_if_lossy(self) -> None:
        """Warn where rounding took more than a tenth of an update: the merged model is then not the trained one."""
        if self.worst > WORTH_A_WARNING:
            warnings.warn(
                f"{self}. The weights are too coarse for so small an update: keep the adapter apart, or merge into "
                f"float32 weights.",
                stacklevel=4,
            )
