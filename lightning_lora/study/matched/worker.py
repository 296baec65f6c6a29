"""A worker of a study: claims one run after the other until nothing is left to do, for any number of workers."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from lightning_lora.errors import ConfigError
from lightning_lora.study.bank.exactness import ApartError
from lightning_lora.study.bank.groups import Job, SideBySide
from lightning_lora.study.matched.cells import Cell, CellStatus, Outcome
from lightning_lora.study.matched.folder import write_results
from lightning_lora.study.matched.planner import StudyPlan, plan_study
from lightning_lora.study.matched.progress import Progress
from lightning_lora.study.matched.record import CHECKPOINTS
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


def _status(plan: StudyPlan, status: CellStatus) -> CellStatus:
    """What is known of a run, which the plan may have given up."""
    reason = plan.pruned.get(status.cell.key)
    return status if reason is None else replace(status, state="pruned", reason=reason)


RunCell = Callable[[Cell, Path, threading.Event], Outcome]
"""Does a run in a folder, and stops early with `LeaseLostError` if the event is set. Raises `RunError` if it fails."""


class Worker:
    """Does the runs of a study.

    Args:
        tell: Takes lines for the user.
        side_by_side: Does several runs on one base; None: one run after the other.
    """

    def __init__(
        self,
        spec: StudySpec,
        data: Mapping[str, str],
        folder: Path,
        store: Store,
        run_cell: RunCell,
        tell: Callable[[str], None] = print,
        side_by_side: SideBySide | None = None,
    ) -> None:
        self.spec = spec
        self.data = data
        self.folder = folder
        self.store = store
        self.run_cell = run_cell
        self.tell = tell
        self.side_by_side = side_by_side
        self.progress = Progress()

    def work(self) -> StudyPlan:
        """Run until nothing is left, by this worker or any other."""
        while True:
            plan, statuses = self.plan()
            if (claim := self.store.claim()) is not None:
                self._do([claim, *self._others(claim)], plan)
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
        statuses = [_status(plan, known.get(cell.key, CellStatus(cell, "ready"))) for cell in plan.cells]
        write_results(self.folder, statuses, plan.choices, plan.verdicts, plan.further)
        return plan, statuses

    def _others(self, first: Claim) -> Iterator[Claim]:
        """Claim runs that can be done side by side with one that is claimed."""
        group = self.side_by_side
        if group is None or not group.takes(first.cell, first.attempt):
            return
        for _ in range(group.most - 1):
            claim = self.store.claim(lambda cell, attempt: group.suits(first.cell, cell, attempt))
            if claim is None:
                return
            yield claim

    def _do(self, claims: Sequence[Claim], plan: StudyPlan) -> None:
        started = time.monotonic()
        with ExitStack() as leases:
            jobs: list[Job] = []
            for claim in claims:
                folder = self.folder / "runs" / claim.cell.run
                folder.mkdir(parents=True, exist_ok=True)
                jobs.append((claim.cell, folder, leases.enter_context(self._beating(claim))))
            results = self._results(jobs)
        seconds = (time.monotonic() - started) / len(claims)
        for claim, result in zip(claims, results, strict=True):
            self._record(claim, result, seconds, plan)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, (RunError, LeaseLostError)):
                raise result

    def _results(self, jobs: Sequence[Job]) -> list[Outcome | BaseException]:
        """What comes out of each run; those that cannot share a base are done one after the other."""
        if self.side_by_side is None or len(jobs) == 1:
            return [self._alone(job) for job in jobs]
        try:
            results, remarks = self.side_by_side.run(jobs)
        except BaseException as error:
            return [error for _ in jobs]
        for remark in remarks:
            self.tell(remark)
        made: list[Outcome | BaseException] = []
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, ApartError):
                self.tell(f"apart, not side by side: {job[0].arm}: {result.reason}")
                # What it has trained may come from a base that another arm has changed.
                shutil.rmtree(job[1] / CHECKPOINTS, ignore_errors=True)
                result = self._alone(job)
            made.append(result)
        return made

    def _alone(self, job: Job) -> Outcome | BaseException:
        try:
            return self.run_cell(*job)
        except BaseException as error:
            return error

    def _record(self, claim: Claim, result: Outcome | BaseException, seconds: float, plan: StudyPlan) -> None:
        cell = claim.cell
        if isinstance(result, Outcome):
            if self.store.finish(claim, result):
                over = [status for status in self.store.statuses() if status.is_over]
                self.tell(self.progress.done(cell, result, seconds, len(over), plan.expected))
        elif isinstance(result, LeaseLostError):
            self.tell(f"{cell.run}: another worker has taken this run over")
        elif not isinstance(result, RunError):
            self.store.release(claim)
        elif result.is_busy:
            # A worker that was asleep finds out at its next beat that it has lost the run, and stops.
            self.store.release(claim)
            time.sleep(self.store.lease / BEATS)
        elif self.store.fail(claim, result.reason, result.is_final):
            self.tell(self.progress.failed(cell, result.reason))

    @contextmanager
    def _beating(self, claim: Claim) -> Iterator[threading.Event]:
        """Renew the lease from a thread; the event is set when it is lost."""
        lost, stop = threading.Event(), threading.Event()

        def beat() -> None:
            store, alive = None, time.monotonic()
            while not stop.wait(self.store.lease / BEATS):
                try:
                    store = store or self.store.another()
                    if not store.beat(claim):
                        break
                    alive = time.monotonic()
                except ConfigError:  # a server that is away may be back before the lease ends
                    if time.monotonic() - alive > self.store.lease:
                        break
            if not stop.is_set():
                lost.set()
            if store is not None:
                store.close()

        thread = threading.Thread(target=beat, name="lease", daemon=True)
        thread.start()
        try:
            yield lost
        finally:
            stop.set()
            thread.join()
