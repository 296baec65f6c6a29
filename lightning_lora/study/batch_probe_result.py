"""The result of a `BatchProbe`: losses, paired differences, and the largest harmless batch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, Literal

from lightning_lora.batch.calibration import PROBE_FORMAT, damaged_probe, read_probe
from lightning_lora.files.atomic import write_text
from lightning_lora.study.comparison import ENOUGH_ROWS, IN_WORDS, Comparison
from lightning_lora.study.statistics.word import BAND, word_of


@dataclass(frozen=True)
class BatchProbeResult:
    """Losses of all branches, and their comparisons in pairs.

    Args:
        num_rows: Rows that each branch trained on.
        num_held_out: Held-out rows that each branch was scored on.
        start_loss: Mean held-out loss before the branches, nats.
        losses: Mean held-out loss after the branches of each batch, nats; keys are rows per step, ascending.
        comparisons: Comparisons of every pair of batches.
        noise_scale: Noise scale of the run when it was probed, rows; None if unknown.
        step: Optimizer step of the run; None outside of a run.
    """

    batch_rows: int
    num_rows: int
    num_held_out: int
    start_loss: float
    losses: dict[int, float]
    comparisons: tuple[Comparison, ...]
    noise_scale: float | None = None
    step: int | None = None
    seconds: float = 0.0

    @property
    def largest_harmless(self) -> int:
        """The largest batch, in rows per step, such that every batch up to it matches all smaller ones."""
        return self._walk()[0]

    @property
    def undecided(self) -> int | None:
        """The batch above `largest_harmless` if nobody can tell whether it is worse; else None."""
        return self._walk()[1]

    @property
    def bound(self) -> Literal["", "at least", "at most"]:
        """Whether `largest_harmless` is only a bound.

        It is one if it is the largest or smallest batch that was tried, or the next one cannot be told.
        """
        if self.undecided is not None or self.largest_harmless == max(self.losses):
            return "at least"
        return "at most" if self.largest_harmless == min(self.losses) else ""

    @property
    def calibration(self) -> float | None:
        """`largest_harmless` over the noise scale, for a `BatchSizeMonitor`.

        None if the noise scale is unknown, or nothing is known of any batch but the smallest.
        """
        if self.noise_scale is None or (self.undecided is not None and self.largest_harmless == min(self.losses)):
            return None
        return self.largest_harmless / self.noise_scale

    def _walk(self) -> tuple[int, int | None]:
        """The last batch before one that is not harmless, and that one if it is not worse either."""
        harmless = min(self.losses)
        for batch in sorted(self.losses):
            pairs = [pair for pair in self.comparisons if pair.large == batch]
            if not all(pair.is_harmless for pair in pairs):
                return harmless, None if any(pair.is_worse for pair in pairs) else batch
            harmless = batch
        return harmless, None

    def save(self, path: str | PathLike[str]) -> None:
        """Write the result as JSON. An interrupted write leaves the old file."""
        found = {"largest_harmless": self.largest_harmless, "bound": self.bound, "calibration": self.calibration}
        text = json.dumps({"format": PROBE_FORMAT} | asdict(self) | found, indent=2)
        write_text(path, f"{text}\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> BatchProbeResult:
        """Read a result that `save` wrote.

        Raises:
            DataError: If the file cannot be read, or is damaged.
        """
        found = read_probe(path)
        try:
            return _read(cls, found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged_probe(path, error) from error

    def __str__(self) -> str:
        when = "" if self.step is None else f" after step {self.step:,}"
        lines = [
            f"batch probe{when}: {self.num_rows:,} rows to each of {len(self.losses)} batches, loss on "
            f"{self.num_held_out:,} held-out rows ({self.start_loss:.4f} before), {self.seconds:.0f} s"
        ]
        lines += [self._line(batch) for batch in self.losses]
        lines += [f"  {pair.large} against {pair.small}: {pair}, {self._word(pair)}" for pair in self.comparisons]
        if self.num_held_out < ENOUGH_ROWS:
            lines.append(
                f"  {self.num_held_out} held-out rows are few: use {ENOUGH_ROWS} or more for a useful interval."
            )
        lines.append(f"  {self._answer()}")
        return "\n".join(lines)

    def _line(self, batch: int) -> str:
        here = "  (the run's own)" if batch == self.batch_rows else ""
        return f"  {batch:>6} rows a step, {self.num_rows // batch:>4} steps: {self.losses[batch]:.4f}{here}"

    def _word(self, pair: Comparison) -> str:
        fallen = pair.word != word_of(pair.interval)
        return f"{IN_WORDS[pair.word]} ({len(self.comparisons)} comparisons)" if fallen else IN_WORDS[pair.word]

    def _answer(self) -> str:
        bound = f"{self.bound} " if self.bound else ""
        text = f"largest batch that costs nothing (within {BAND:g} nats): {bound}{self.largest_harmless} rows a step"
        if self.undecided is None:
            return text
        return f"{text}; of {self.undecided} nobody can tell, more held-out rows would"


def _read(cls: type[BatchProbeResult], found: Mapping[str, Any]) -> BatchProbeResult:
    losses = _losses(found["losses"])
    scale = found["noise_scale"]
    comparisons = tuple(Comparison.read(pair) for pair in found["comparisons"])
    if not losses or {(pair.small, pair.large) for pair in comparisons} != _pairs(losses):
        raise ValueError("a comparison is missing")
    if scale is not None and not 0 < float(scale) < math.inf:
        raise ValueError(f"noise_scale {scale!r}")
    return cls(
        **{name: int(found[name]) for name in ("batch_rows", "num_rows", "num_held_out")},
        start_loss=float(found["start_loss"]),
        losses=losses,
        comparisons=comparisons,
        noise_scale=None if scale is None else float(scale),
        step=None if found["step"] is None else int(found["step"]),
        seconds=float(found["seconds"]),
    )


def _losses(found: Mapping[str, Any]) -> dict[int, float]:
    return dict(sorted((int(batch), float(loss)) for batch, loss in found.items()))


def _pairs(losses: Mapping[int, float]) -> set[tuple[int, int]]:
    return {(small, large) for small in losses for large in losses if small < large}
