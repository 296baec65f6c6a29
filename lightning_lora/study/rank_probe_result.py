"""The result of a `RankProbe`: two losses, their paired difference, and the verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from lightning_lora.errors import ResultFileError
from lightning_lora.files.atomic import write_text
from lightning_lora.study.comparison import ENOUGH_ROWS, ENOUGH_SEEDS
from lightning_lora.study.statistics.interval import Interval
from lightning_lora.study.statistics.word import BAND, Word, word_of

RANK_PROBE_FILE = "rank_probe.json"
Verdict = Literal["CONFIRMED", "NOT CONFIRMED", "CANNOT TELL"]
_FORMAT = "lightning-lora rank probe 2"


@dataclass(frozen=True)
class RankProbeResult:
    """Losses of the branch with more rank and of the control branch, on the same held-out rows.

    Args:
        rank: Rank of the run; that of most weights where weights differ.
        grown_rank: Rank of the grown branch, likewise.
        num_rows: Rows that each branch trained on.
        num_held_out: Held-out rows that each branch was scored on.
        start_loss: Mean held-out loss before the branches, nats.
        control_loss: Mean held-out loss after the branch without growth, nats.
        grown_loss: Mean held-out loss after the branch with growth, nats.
        error: Standard error of ``control_loss - grown_loss``, nats.
        freedom: Degrees of freedom of ``error``.
        step: Optimizer step of the run; None outside of a run.
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
    freedom: float
    step: int | None = None
    seconds: float = 0.0

    @property
    def gain(self) -> float:
        """How much lower the loss is with more rank than without, nats."""
        return self.control_loss - self.grown_loss

    @property
    def interval(self) -> Interval:
        """The gain with its interval, nats."""
        return Interval(self.gain, self.error, self.freedom)

    @property
    def confirmed(self) -> bool:
        """Whether more rank helps: the whole interval of the gain is above zero, and not all of it within 0.005."""
        return self.verdict == "CONFIRMED"

    @property
    def verdict(self) -> Verdict:
        """``"CONFIRMED"`` if more rank helps, ``"NOT CONFIRMED"`` if it matches or does worse, else neither."""
        # A gain is a loss of the control branch: it "falls behind".
        return _VERDICTS[word_of(self.interval)]

    def save(self, path: str | PathLike[str]) -> None:
        """Write the result as JSON. An interrupted write leaves the old file."""
        text = json.dumps({"format": _FORMAT} | asdict(self) | {"gain": self.gain, "verdict": self.verdict}, indent=2)
        write_text(path, f"{text}\n")

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
            raise ResultFileError(
                f"{path} cannot be read: {error.strerror}. A RankProbe writes {RANK_PROBE_FILE}."
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ResultFileError(
                f"{path} is not a complete result of a rank probe ({error!r}): run the probe again."
            ) from error

    def __str__(self) -> str:
        when = "" if self.step is None else f" after step {self.step:,}"
        orders = f" in {self.num_seeds} orders" if self.num_seeds > 1 else ""
        steps, low, high = self.num_rows // self.batch_rows, self.interval.low, self.interval.high
        lines = [
            f"rank probe{when}: {steps:,} steps of {self.batch_rows} rows{orders} at each rank, loss on "
            f"{self.num_held_out:,} held-out rows ({self.start_loss:.4f} before), {self.seconds:.0f} s",
            f"  rank {self.rank:>4}: {self.control_loss:.4f}  (the run's own)",
            f"  rank {self.grown_rank:>4}: {self.grown_loss:.4f}",
            f"  gain {self.gain:+.4f} ({low:+.4f} to {high:+.4f}) nats; {BAND:g} counts as none",
        ]
        if self.num_held_out < ENOUGH_ROWS:
            lines.append(f"  {self.num_held_out} held-out rows are few: use {ENOUGH_ROWS} or more.")
        if self.num_seeds < ENOUGH_SEEDS:
            lines.append(
                f"  the interval leaves out other orders of the data: num_seeds={ENOUGH_SEEDS} would include them."
            )
        return "\n".join([*lines, f"  {self.verdict}: {_MEANINGS[self.verdict]}"])


_VERDICTS: Mapping[Word, Verdict] = {
    "behind": "CONFIRMED",
    "matches": "NOT CONFIRMED",
    "ahead": "NOT CONFIRMED",
    "cannot tell": "CANNOT TELL",
}
_MEANINGS: Mapping[Verdict, str] = {
    "CONFIRMED": "more rank helps",
    "NOT CONFIRMED": "more rank is of no use in these steps",
    "CANNOT TELL": "the interval is too wide to say; more held-out rows or orders of the data would narrow it",
}


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
