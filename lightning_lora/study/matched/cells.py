"""A cell: one run that a study wants, and the key by which every worker knows it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_lora.study.matched.record import Phase, RowLosses, State


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        learning_rate: In terms of full fine-tuning, rounded to six digits.
        seed: Moves data order, initialisation and dropout alike in all arms.
        key: 16 hexadecimal digits of the SHA-256 of its resolved config, its data and its phase.
        goes_on: For a rung, the key of the selection run that goes on from it, in the same folder.
    """

    arm: str
    learning_rate: float
    seed: int
    phase: Phase
    key: str
    goes_on: str = ""

    @property
    def run(self) -> str:
        """The name of its run folder, made of characters that every file system takes."""
        arm = re.sub(r"[^\w.-]+", "-", self.arm).strip("-.") or "arm"
        phase = "selection" if self.phase == "rung" else self.phase
        return f"{arm}-lr{self.learning_rate:g}-s{self.seed}-{phase}-{(self.goes_on or self.key)[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the database."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What a finished run has measured.

    Args:
        tokens: Supervised tokens trained on; rows where the batches have no tokens.
        seconds: Seconds of training, without validation.
        peak_bytes: Peak memory; None where it is unknown.
        trained_parameters: Number of trained parameters.
        saved_bytes: Bytes of the saved adapter, or of the trained weights.
        rows: Losses on held-out rows.
        rows_hash: Hash of what these rows hold: runs are compared on equal rows only.
        evaluations: Step, tokens and validation loss of each evaluation; for the base that at step 0.
        rate_fell: Whether a learning rate was lowered during the run: then steps to a loss say something of the
            schedule only.
        energy_joules: Energy of the GPU while it trained; None where it does not tell.
    """

    steps: int
    tokens: int
    seconds: float
    peak_bytes: int | None
    trained_parameters: int
    saved_bytes: int
    rows: RowLosses
    rows_hash: str = ""
    evaluations: tuple[tuple[int, int, float], ...] = ()
    rate_fell: bool = False
    energy_joules: float | None = None


@dataclass(frozen=True)
class CellStatus:
    """A cell and how far it is.

    Args:
        attempt: How often it was begun.
        reason: Why it failed, or was pruned.
        outcome: What it has measured, if it is done.
    """

    cell: Cell
    state: State
    attempt: int = 0
    reason: str = ""
    outcome: Outcome | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be known of it."""
        return self.state in ("done", "failed", "pruned")

    @property
    def diverged(self) -> bool:
        """Whether it was stopped by a number that is not finite."""
        return self.state == "failed" and self.reason.startswith(DIVERGED)

    @property
    def loss(self) -> float | None:
        """Nats per supervised token on the held-out rows of its phase; None if it has none, or is pruned."""
        return None if self.outcome is None or self.state == "pruned" else self.outcome.rows.mean(self.cell.phase)


DIVERGED = "diverged"
"""The first word of the reason of a run that met NaN or infinity."""


def cell_key(config: Mapping[str, Any], data: Mapping[str, str], phase: str, rate: float, seed: int) -> str:
    """The key of a cell: equal for equal work, on every machine."""
    content = json.dumps([config, data, phase, f"{rate:.6g}", seed], sort_keys=True, default=str, allow_nan=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
