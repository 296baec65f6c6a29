"""The result of a `RankProbe`: two losses, their paired difference, and the verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from lightning_lora.errors import DataError
from lightning_lora.files.atomic import atomic_file
from lightning_lora.study.paired import ENOUGH_ROWS, ENOUGH_SEEDS, TOLERANCE, Comparison

RANK_PROBE_FILE = "rank_probe.json"
_FORMAT = "lightning-lora rank probe 1"


@dataclass(frozen=True)
class RankProbeResult:
    """Losses of the branch with more rank and of the control branch, on the same held-out rows.

    Args:
        rank: Rank of the run; that of most weights where weights differ.
        grown_rank: Rank of the grown branch, likewise.
        batch_rows: Rows per step.
        num_rows: Rows that each branch trained on.
        num_held_out: Held-out rows that each branch was scored on.
        num_seeds: Orders of the data.
        start_loss: Mean held-out loss before the branches, nats.
        control_loss: Mean held-out loss after the branch without growth, nats.
        grown_loss: Mean held-out loss after the branch with growth, nats.
        error: Standard error of ``control_loss - grown_loss``, nats.
        step: Optimizer step of the run; None outside of a run.
        seconds: Duration of the probe.
    """

    rank: int
    grown_rank: int
    batch_rows: int
    num_rows: int
    num_held_out: int
    num_seeds: int
    start_loss: float
    control_loss: float
    grown_loss: float
    error: float
    step: int | None = None
    seconds: float = 0.0

    @property
    def gain(self) -> float:
        """How much lower the loss is with more rank than without, nats."""
        return self.control_loss - self.grown_loss

    @property
    def confirmed(self) -> bool:
        """Whether more rank helps: by more than 0.005 nats and two standard errors."""
        return Comparison(self.rank, self.grown_rank, -self.gain, self.error).is_better

    @property
    def verdict(self) -> Literal["CONFIRMED", "NOT CONFIRMED"]:
        """``"CONFIRMED"`` if more rank helps, else ``"NOT CONFIRMED"``."""
        return "CONFIRMED" if self.confirmed else "NOT CONFIRMED"

    def save(self, path: str | PathLike[str]) -> None:
        """Write the result as JSON. An interrupted write leaves the old file."""
        text = json.dumps({"format": _FORMAT} | asdict(self) | {"gain": self.gain, "verdict": self.verdict}, indent=2)
        with atomic_file(path) as file:
            file.write(f"{text}\n".encode())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RankProbeResult:
        """Read a result that `save` wrote.

        Raises:
            DataError: If the file cannot be read, or is damaged.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found["format"] != _FORMAT:
                raise ValueError(f"format {found['format']!r}, expected {_FORMAT!r}")
            return cls(**_values(found))
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}. A RankProbe writes {RANK_PROBE_FILE}."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not a complete result of a rank probe ({error!r}): run the probe again."
            ) from error

    def __str__(self) -> str:
        when = "" if self.step is None else f" after step {self.step:,}"
        orders = f" in {self.num_seeds} orders" if self.num_seeds > 1 else ""
        steps = self.num_rows // self.batch_rows
        lines = [
            f"rank probe{when}: {steps:,} steps of {self.batch_rows} rows{orders} at each rank, loss on "
            f"{self.num_held_out:,} held-out rows ({self.start_loss:.4f} before), {self.seconds:.0f} s",
            f"  rank {self.rank:>4}: {self.control_loss:.4f}  (the run's own)",
            f"  rank {self.grown_rank:>4}: {self.grown_loss:.4f}",
            f"  gain {self.gain:+.4f} +- {2 * self.error:.4f} nats; it counts above {TOLERANCE} and its interval",
        ]
        if self.num_held_out < ENOUGH_ROWS:
            lines.append(f"  {self.num_held_out} held-out rows are few: use {ENOUGH_ROWS} or more.")
        if self.num_seeds < ENOUGH_SEEDS:
            lines.append(
                f"  the interval leaves out other orders of the data: num_seeds={ENOUGH_SEEDS} would include them."
            )
        meaning = "more rank helps" if self.confirmed else "no use of more rank seen in these steps"
        return "\n".join([*lines, f"  {self.verdict}: {meaning}"])


def _values(found: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for each in fields(RankProbeResult):
        value = found[each.name]
        if each.name == "step" and value is None:
            values["step"] = None
        elif each.type.startswith("int"):  # pyright: ignore[reportAttributeAccessIssue]
            values[each.name] = int(value)
        else:
            values[each.name] = float(value)
    if values["rank"] < 1 or values["grown_rank"] <= values["rank"] or math.isnan(values["error"]):
        raise ValueError(f"rank {values['rank']} to {values['grown_rank']}")
    return values
