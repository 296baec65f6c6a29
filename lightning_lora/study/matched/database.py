"""One database for all workers of a study: SQLite in the study folder, or a PostgreSQL server for many machines."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lightning_lora.errors import ConfigError, StudySettingError, first_line

NETWORK_DISKS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "fuse.sshfs", "9p")
WAIT_SECONDS = 60
"""How long a transaction waits for those of other workers, and for a server that restarts."""


class ServerGoneError(ConfigError):
    """The server went away in the middle of a transaction, which the next one may find back."""


class Transaction(Protocol):
    """Runs statements with ``?`` for values."""

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Any:
        """Run a statement; the result has ``fetchone``, ``fetchall`` and ``rowcount``."""
        ...


class Database:
    """A connection to the database of a study.

    Args:
        url: ``sqlite:///FILE`` or ``postgresql://USER@HOST/NAME``.

    Attributes:
        now: An expression for the seconds since 1970 by the clock of the database, which all workers share.

    Raises:
        ConfigError: If the URL is of another kind, or the database cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.shown = re.sub(r"//([^:@/]*):[^@/]*@", r"//\1:***@", url)
        self.is_sqlite = url.startswith("sqlite:///")
        if self.is_sqlite:
            self.now = "((julianday('now') - 2440587.5) * 86400.0)"
            self._connection: Any = self._open_file(Path(url.removeprefix("sqlite:///")))
        elif re.match(r"postgres(ql)?(\+psycopg2?)?://", url):
            self.now = "extract(epoch from clock_timestamp())::double precision"
            self._url = re.sub(r"^postgres(ql)?(\+psycopg2?)?://", "postgresql://", url)
            self._connection = self._open_server(self._url)
        else:
            raise StudySettingError(f"storage {self.shown} must be sqlite:///FILE or postgresql://USER@HOST/NAME.")

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """All statements of the block or none; transactions of other workers come before or after it.

        Raises:
            ConfigError: If the database cannot be used.
            ServerGoneError: If the server goes away within the block. Its statements may then have been done: what is
                tried again must be able to find them done.
        """
        if not self.is_sqlite:
            self._wait_for_server()
        try:
            if self.is_sqlite:
                # Immediate: a transaction that first reads and then writes must not lose its place to another one.
                self._connection.execute("BEGIN IMMEDIATE")
                with self._connection:
                    yield self._connection
            else:
                with self._connection.transaction():
                    yield _Placeholders(self._connection)
        except self._errors as error:
            kind = ServerGoneError if not self.is_sqlite and self._connection.closed else ConfigError
            raise kind(f"storage {self.shown} cannot be used: {_reason(error)}.") from error

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _open_file(self, path: Path) -> Any:
        self._errors: tuple[type[Exception], ...] = (sqlite3.Error,)
        if kind := network_disk(path.absolute().parent):
            raise StudySettingError(
                f"storage {path} is on a network disk ({kind}), where SQLite loses writes of several machines: give "
                f"--storage postgresql://USER@HOST/NAME."
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, WAIT_SECONDS, isolation_level=None, check_same_thread=False)
            connection.execute("SELECT count(*) FROM sqlite_master")
        except (sqlite3.Error, OSError) as error:
            raise StudySettingError(f"storage {path} cannot be opened: {_reason(error)}.") from error
        return connection

    def _open_server(self, url: str) -> Any:
        try:
            import psycopg
        except ImportError as error:
            raise StudySettingError(
                "a PostgreSQL storage needs the package psycopg: pip install lightning-lora[study]."
            ) from error
        self._errors = (psycopg.Error,)
        try:
            return psycopg.connect(url, autocommit=True, connect_timeout=20)
        except psycopg.Error as error:
            raise StudySettingError(f"storage {self.shown} cannot be reached: {_reason(error)}.") from error

    def _wait_for_server(self) -> None:
        """Connect again if the connection is gone, as it is after a restart of the server."""
        end = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                if self._connection.closed:
                    self._connection = self._open_server(self._url)
                self._connection.execute("SELECT 1")
                return
            except (ConfigError, *self._errors) as error:
                self._connection.close()
                if time.monotonic() > end:
                    raise StudySettingError(
                        f"storage {self.shown} has been away for {WAIT_SECONDS} s: {_reason(error)}. Finished runs "
                        f"are kept: give the same command again when the server is back."
                    ) from error
            time.sleep(1)


class _Placeholders:
    """Statements with ``?`` for a driver that wants ``%s``."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Any:
        return self._connection.execute(statement.replace("?", "%s"), values)


def network_disk(folder: Path) -> str:
    """The kind of the network disk that a folder lies on; "" for a local disk, or where the system does not tell."""
    mounts = Path("/proc/self/mounts")
    if not mounts.is_file():
        return ""
    while not folder.exists():
        folder = folder.parent
    real, found = folder.resolve(), (Path("/"), "")
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, place, kind = line.split(" ")[:3]
        mounted = Path(place.replace("\\040", " "))
        if real.is_relative_to(mounted) and len(mounted.parts) >= len(found[0].parts):
            found = mounted, kind
    return found[1] if found[1] in NETWORK_DISKS else ""


def _reason(error: Exception) -> str:
    return first_line(error).rstrip(".")
