"""A worker of a study: claims one run after the other until nothing is left to do, for any number of workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lightning_lora.errors import ConfigError
from lightning_lora.study.matched.cells import Cell, CellStatus, Outcome
from lightning_lora.study.matched.folder import write_results
from lightning_lora.study.matched.planner import StudyPlan, plan_study
from lightning_lora.study.matched.progress import Progress
from lightning_lora.study.matched.spec import StudySpec
from lightning_lora.study.matched.store import Claim, Store

BEATS = 12
"""Renewals in the time of a lease."""
POLL_SECONDS = 1.0


class RunError(Exception):
    """A run failed.

    Args:
        reason: Why, one line for its row.
        is_final: Whether another attempt would fail in the same way.
        is_busy: Whether nothing is wrong but that another process still writes in the run folder.
    """

    def __init__(self, reason: str, is_final: bool, is_busy: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_final = is_final
        self.is_busy = is_busy


class LeaseLostError(Exception):
    """A run was stopped because another worker has it now."""


RunCell = Callable[[Cell, Path, threading.Event], Outcome]
"""Does a run in a folder, and stops early with `LeaseLostError` if the event is set. Raises `RunError` if it fails."""


class Worker:
    """Does the runs of a study.

    Args:
        spec: The study.
        data: Fingerprints of its data files.
        folder: The study folder.
        store: Its runs.
        run_cell: Does one run.
        tell: Takes lines for the user.
    """

    def __init__(
        self,
        spec: StudySpec,
        data: Mapping[str, str],
        folder: Path,
        store: Store,
        run_cell: RunCell,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.spec = spec
        self.data = data
        self.folder = folder
        self.store = store
        self.run_cell = run_cell
        self.tell = tell
        self.progress = Progress()

    def work(self) -> StudyPlan:
        """Run until nothing is left, by this worker or any other."""
        while True:
            plan, statuses = self.plan()
            if (claim := self.store.claim()) is not None:
                self._do(claim, plan)
            elif all(status.is_over for status in statuses):
                return plan
            else:
                time.sleep(min(POLL_SECONDS, self.store.lease / 4))

    def plan(self) -> tuple[StudyPlan, list[CellStatus]]:
        """Ask for the runs that are wanted now, and write the results so far: all from one look at the database.

        The last look of the last worker sees all runs, so the files are complete whichever worker writes later.
        """
        known = {status.cell.key: status for status in self.store.statuses()}
        plan = plan_study(self.spec, known.values(), self.data)
        self.store.add(cell for cell in plan.cells if cell.key not in known)
        # Runs of arms that were taken out of the study stay in the database, and out of its results.
        statuses = [known.get(cell.key, CellStatus(cell, "ready")) for cell in plan.cells]
        write_results(self.folder, statuses, plan.choices, plan.verdicts, plan.further)
        return plan, statuses

    def _do(self, claim: Claim, plan: StudyPlan) -> None:
        cell = claim.cell
        folder = self.folder / "runs" / cell.run
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        try:
            with self._beating(claim) as lost:
                outcome = self.run_cell(cell, folder, lost)
        except RunError as error:
            if error.is_busy:
                # A worker that was asleep finds out at its next beat that it has lost the run, and stops.
                self.store.release(claim)
                time.sleep(self.store.lease / BEATS)
            elif self.store.fail(claim, error.reason, error.is_final):
                self.tell(self.progress.failed(cell, error.reason))
            return
        except LeaseLostError:
            self.tell(f"{cell.run}: another worker has taken this run over")
            return
        except BaseException:
            self.store.release(claim)
            raise
        if self.store.finish(claim, outcome):
            over = [status for status in self.store.statuses() if status.is_over]
            self.tell(self.progress.done(cell, outcome, time.monotonic() - started, len(over), plan.expected))

    @contextmanager
    def _beating(self, claim: Claim) -> Iterator[threading.Event]:
        """Renew the lease from a thread; the event is set when it is lost."""
        lost, stop = threading.Event(), threading.Event()

        def beat() -> None:
            store, alive = self.store.another(), time.monotonic()
            while not stop.wait(self.store.lease / BEATS):
                try:
                    if not store.beat(claim):
                        break
                    alive = time.monotonic()
                except ConfigError:  # a server that restarts may be back before the lease ends
                    if time.monotonic() - alive > self.store.lease:
                        break
                    store = self._reconnected(store)
            if not stop.is_set():
                lost.set()
            store.close()

        thread = threading.Thread(target=beat, name="lease", daemon=True)
        thread.start()
        try:
            yield lost
        finally:
            stop.set()
            thread.join()

    @staticmethod
    def _reconnected(store: Store) -> Store:
        try:
            return store.another()
        except ConfigError:
            return store
