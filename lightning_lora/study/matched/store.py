"""Which run belongs to which worker: tables with leases, in the database that all workers of a study share.

A worker claims a run for some time and renews the lease while it works. A worker that dies stops renewing, and another
one claims the run after that time. Each claim has a number, the attempt: whoever lost a lease can write nothing more.
So a result is recorded once, whatever is killed.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from lightning_lora.errors import StudySettingError
from lightning_lora.files.folder_lock import is_dead_process, process_name
from lightning_lora.study.matched.cells import Cell, CellStatus, Outcome
from lightning_lora.study.matched.database import WAIT_SECONDS, Database, ServerGoneError, Transaction
from lightning_lora.study.matched.outcomes import outcome_from_text, outcome_to_text

LEASE_SECONDS = 120.0
"""How long a claim lasts without being renewed."""
MOST_LOST = 5
"""Leases that a run may lose: something kills it each time."""
MOST_ERRORS = 2
"""Attempts of a run that ends with an error other than NaN or bad input."""
_VERSION = 1
_P = ParamSpec("_P")
_T = TypeVar("_T")
_TABLES = (
    """CREATE TABLE IF NOT EXISTS ll_study (name TEXT PRIMARY KEY, spec TEXT NOT NULL, version INTEGER NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS ll_cell (study TEXT NOT NULL, key TEXT NOT NULL, place INTEGER NOT NULL,
    spec TEXT NOT NULL, state TEXT NOT NULL, owner TEXT NOT NULL, attempt INTEGER NOT NULL, expires DOUBLE PRECISION
    NOT NULL, lost INTEGER NOT NULL, errors INTEGER NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (study, key))""",
    """CREATE TABLE IF NOT EXISTS ll_result (study TEXT NOT NULL, key TEXT NOT NULL, attempt INTEGER NOT NULL,
    result TEXT NOT NULL, PRIMARY KEY (study, key))""",
)


@dataclass(frozen=True)
class Claim:
    """A run that a worker may do.

    Args:
        attempt: The number of the claim; a later claim of the same run has a higher one.
    """

    cell: Cell
    attempt: int


def _patient(method: Callable[Concatenate[Store, _P], _T]) -> Callable[Concatenate[Store, _P], _T]:
    """Do it again if the server went away within it; what was written nevertheless is not written again."""

    @functools.wraps(method)
    def patient(self: Store, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        end = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                return method(self, *args, **kwargs)
            except ServerGoneError:  # it may restart more than once
                if time.monotonic() > end:
                    raise

    return patient


class Store:
    """The runs of one study in a database.

    Args:
        url: See `Database`.
        lease: Seconds that a claim lasts without being renewed.

    Raises:
        ConfigError: If the database cannot be used.
    """

    def __init__(self, url: str, study: str, lease: float = LEASE_SECONDS) -> None:
        self.url = url
        self.study = study
        self.lease = lease
        self.owner = process_name()
        self._database = Database(url)
        self._now = self._database.now

    @_patient
    def open(self, fingerprint: Mapping[str, Any]) -> None:
        """Create the tables and the study, or join it.

        Args:
            fingerprint: Plain values that must not change between two starts, under ``fixed``, and the arms under
                ``arms``, to which others may be added.

        Raises:
            ConfigError: If the storage holds another study of this name.
        """
        with self._database.transaction() as transaction:
            if not self._database.is_sqlite:
                transaction.execute("SELECT pg_advisory_xact_lock(7230417)")  # two workers may create them at once
            for table in _TABLES:
                transaction.execute(table)
            row = transaction.execute("SELECT spec, version FROM ll_study WHERE name = ?", [self.study]).fetchone()
            if row is None:
                others = transaction.execute("SELECT name FROM ll_study").fetchall() if self._database.is_sqlite else []
                if others:
                    raise StudySettingError(
                        f"storage {self._database.shown} holds the study {others[0][0]!r}, and this one is "
                        f"{self.study!r}: choose another folder with --out."
                    )
                values = [self.study, json.dumps(fingerprint, sort_keys=True), _VERSION]
                transaction.execute("INSERT INTO ll_study (name, spec, version) VALUES (?, ?, ?)", values)
                return
            merged = self._joined(json.loads(row[0]), fingerprint)
            values = [json.dumps(merged, sort_keys=True), self.study]
            transaction.execute("UPDATE ll_study SET spec = ? WHERE name = ?", values)

    def _joined(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
        """The fingerprint of both; refuses one that changes what is recorded."""
        arms = {name: there["arms"][name] for name in there["arms"] if name in here["arms"]}
        changed = [key for key in here["fixed"] if there["fixed"].get(key) != here["fixed"][key]]
        changed += [f"arm {name!r}" for name, arm in arms.items() if arm != here["arms"][name]]
        if changed:
            raise StudySettingError(
                f"storage {self._database.shown} holds another study {self.study!r}: its {', '.join(changed)} differ "
                f"from those here. Arms and seeds may be added; for anything else choose another --out or name."
            )
        return {"fixed": dict(here["fixed"]), "arms": {**there["arms"], **here["arms"]}}

    @_patient
    def add(self, cells: Iterable[Cell]) -> None:
        """Ask for runs, behind those that were asked for before, which stay as they are."""
        with self._database.transaction() as transaction:
            (last,) = transaction.execute(
                "SELECT coalesce(max(place), 0) FROM ll_cell WHERE study = ?", [self.study]
            ).fetchone()
            for place, cell in enumerate(cells, last + 1):
                transaction.execute(
                    "INSERT INTO ll_cell (study, key, place, spec, state, owner, attempt, expires, lost, errors, "
                    "reason) VALUES (?, ?, ?, ?, 'ready', '', 0, 0, 0, 0, '') ON CONFLICT DO NOTHING",
                    [self.study, cell.key, place, json.dumps(cell.to_dict())],
                )

    @_patient
    def claim(self, suits: Callable[[Cell, int], bool] | None = None) -> Claim | None:
        """Claim a run that waits, or one whose worker is gone; None if there is none.

        Args:
            suits: Whether a run may be claimed with this number of the claim; None: the first one is taken.
        """
        limit = "LIMIT 1" if suits is None else ""
        with self._database.transaction() as transaction:
            self._give_up(transaction)
            rows = transaction.execute(
                f"SELECT key, spec, attempt, state FROM ll_cell WHERE study = ? AND (state = 'ready' OR (state = "
                f"'running' AND expires < {self._now})) ORDER BY place, key {limit} {self._locked}",
                [self.study],
            ).fetchall()
            row = next((r for r in rows if suits is None or suits(Cell(**json.loads(r[1])), r[2] + 1)), None)
            if row is None:
                return None
            key, spec, attempt, state = row
            done = transaction.execute(
                f"UPDATE ll_cell SET state = 'running', owner = ?, attempt = ?, expires = {self._now} + ?, lost = lost "
                f"+ ? WHERE study = ? AND key = ? AND attempt = ?",
                [self.owner, attempt + 1, self.lease, int(state == "running"), self.study, key, attempt],
            )
            return Claim(Cell(**json.loads(spec)), attempt + 1) if done.rowcount == 1 else None

    @property
    def _locked(self) -> str:
        return "" if self._database.is_sqlite else "FOR UPDATE SKIP LOCKED"

    def _give_up(self, transaction: Transaction) -> None:
        """Let leases of dead processes of this machine expire, and end runs that were killed too often."""
        running = transaction.execute(
            "SELECT key, owner, attempt FROM ll_cell WHERE study = ? AND state = 'running'", [self.study]
        ).fetchall()
        for key, owner, attempt in running:
            if is_dead_process(owner):
                values = [self.study, key, attempt]
                transaction.execute(
                    "UPDATE ll_cell SET expires = 0 WHERE study = ? AND key = ? AND attempt = ?", values
                )
        transaction.execute(
            f"UPDATE ll_cell SET state = 'failed', reason = ? WHERE study = ? AND state = 'running' AND expires < "
            f"{self._now} AND lost >= ?",
            [f"killed {MOST_LOST} times; out of memory?", self.study, MOST_LOST - 1],
        )

    @_patient
    def beat(self, claim: Claim) -> bool:
        """Renew a lease; False if it is lost, and then nothing may be written for this claim any more."""
        return self._update(claim, f"expires = {self._now} + ?", [self.lease])

    @_patient
    def finish(self, claim: Claim, outcome: Outcome) -> bool:
        """Record a result; False if the lease was lost before."""
        with self._database.transaction() as transaction:
            if not self._update(claim, "state = 'done', reason = ''", [], transaction):
                return False
            transaction.execute(
                "INSERT INTO ll_result (study, key, attempt, result) VALUES (?, ?, ?, ?)",
                [self.study, claim.cell.key, claim.attempt, outcome_to_text(outcome)],
            )
        return True

    @_patient
    def fail(self, claim: Claim, reason: str, is_final: bool) -> bool:
        """Record that a run failed; it is tried once more unless ``is_final``. False if the lease was lost before."""
        with self._database.transaction() as transaction:
            state = f"CASE WHEN ? = 1 OR errors + 1 >= {MOST_ERRORS} THEN 'failed' ELSE 'ready' END"
            values = [int(is_final), reason]
            return self._update(claim, f"state = {state}, errors = errors + 1, reason = ?", values, transaction)

    @_patient
    def release(self, claim: Claim) -> bool:
        """Give a run back that was stopped, for whoever comes next."""
        return self._update(claim, "state = 'ready', expires = 0", [])

    @_patient
    def retry_failed(self) -> int:
        """Let all failed runs be tried again; returns their number."""
        with self._database.transaction() as transaction:
            return transaction.execute(
                "UPDATE ll_cell SET state = 'ready', lost = 0, errors = 0 WHERE study = ? AND state = 'failed'",
                [self.study],
            ).rowcount

    @_patient
    def statuses(self) -> list[CellStatus]:
        """All runs, in the order in which they were asked for."""
        with self._database.transaction() as transaction:
            rows = transaction.execute(
                "SELECT c.spec, c.state, c.attempt, c.reason, r.result FROM ll_cell c LEFT JOIN ll_result r ON r.study "
                "= c.study AND r.key = c.key WHERE c.study = ? ORDER BY c.place, c.key",
                [self.study],
            ).fetchall()
        return [
            CellStatus(Cell(**json.loads(spec)), state, attempt, reason, outcome_from_text(result) if result else None)
            for spec, state, attempt, reason, result in rows
        ]

    def another(self) -> Store:
        """A connection of its own, for another thread."""
        other = Store(self.url, self.study, self.lease)
        other.owner = self.owner
        return other

    def close(self) -> None:
        """Close the connection."""
        self._database.close()

    def _update(self, claim: Claim, change: str, values: list[Any], transaction: Transaction | None = None) -> bool:
        """Change a run if it still belongs to this claim."""
        if transaction is None:
            with self._database.transaction() as own:
                return self._update(claim, change, values, own)
        where = [self.study, claim.cell.key, claim.attempt, self.owner]
        mine = "study = ? AND key = ? AND attempt = ? AND owner = ? AND state = 'running'"
        return transaction.execute(f"UPDATE ll_cell SET {change} WHERE {mine}", [*values, *where]).rowcount == 1
