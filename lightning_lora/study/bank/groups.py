"""Which runs of a study train side by side, for the worker that does them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.study.bank.bank import Arm, ArmBank
from lightning_lora.study.matched.cells import Cell, Outcome

if TYPE_CHECKING:
    from lightning_lora.study.matched.spec import StudySpec

Job = tuple[Cell, Path, threading.Event]
"""A run, its folder, and the event that is set when another worker has it."""


@dataclass
class SideBySide:
    """Groups of runs that share a base.

    Args:
        most: Number of runs in a group at most.
        why_apart: Arm to why its runs cannot share their base; arms that can are not in it.
        run: Does a group; an outcome or an error for each run, and remarks for the user.
        bases: Arm to what its base depends on; runs of a group have the same.
        mode: How the arms of a group share the process, in words; "" if the study says it.
    """

    most: int
    why_apart: Mapping[str, str]
    run: Callable[[Sequence[Job]], tuple[Sequence[Outcome | BaseException], Sequence[str]]]
    bases: Mapping[str, Any] = field(default_factory=dict)
    mode: str = ""

    def takes(self, cell: Cell, attempt: int) -> bool:
        """Whether a run may be in a group; one that was begun before goes on alone, as its process may have been
        killed for lack of memory.
        """
        return attempt == 1 and cell.phase != "base" and cell.arm not in self.why_apart

    def suits(self, first: Cell, other: Cell, attempt: int) -> bool:
        """Whether two runs may be in one group."""
        return self.takes(other, attempt) and self.bases.get(first.arm) == self.bases.get(other.arm)

    def announcement(self) -> list[str]:
        """Lines about the arms that run apart, and how the others share the process, each with the reason."""
        reasons: dict[str, list[str]] = {}
        for arm, reason in self.why_apart.items():
            reasons.setdefault(reason, []).append(arm)
        lines = [f"apart, not side by side: {', '.join(arms)}: {reason}" for reason, arms in reasons.items()]
        return [*lines, self.mode] if self.mode else lines


def side_by_side(
    spec: StudySpec,
    why_apart: Mapping[str, str],
    run: Callable[[Sequence[Job]], tuple[Sequence[Outcome | BaseException], Sequence[str]]],
    bases: Mapping[str, Any] | None = None,
) -> SideBySide | None:
    """The groups that a study asks for; None if its runs are done one after the other. Arguments as in `SideBySide`."""
    if spec.arms_per_device == 1:
        return None
    how = "take turns" if spec.arms_mode == "turns" else "share batches"
    mode = f"arms side by side {how}: {spec.mode_reason}" if spec.mode_reason else ""
    return SideBySide(spec.arms_per_device, why_apart, run, bases or {}, mode)


def run_group(
    jobs: Sequence[Job], mode: str, run: Callable[[Cell, Path, threading.Event, Arm], Outcome]
) -> tuple[list[Outcome | BaseException], list[str]]:
    """Do runs side by side in this process.

    Args:
        mode: ``turns`` or ``rows``.

    Returns:
        Outcome or error of each, and remarks for the user.
    """
    bank = ArmBank(mode)  # pyright: ignore[reportArgumentType]
    found = bank.run({job[0].run: partial(run, *job) for job in jobs})
    results = [found[job[0].run] for job in jobs]
    # Memory and energy of a process tell nothing of one run in it.
    results = [
        replace(result, peak_bytes=None, energy_joules=None) if isinstance(result, Outcome) else result
        for result in results
    ]
    return results, [bank.remark] if bank.remark else []
