"""A file that says which process writes in a folder, so that no second one does.

The file names process, host and start. Reading, judging and replacing it happen under a short ``flock``: of two
processes that start at the same moment, or find the same stale lock, one wins.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from lightning_lora.errors import RunFolderError

if sys.platform == "win32":  # there is no flock; the file alone must do
    fcntl: Any = None
else:
    import fcntl


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Args:
        pid: Process number on its host.
        host: Name of the machine.
        born: When the process started, in the system's own ticks; tells a process from another that got its number.
        started: When the lock was taken, ISO 8601 in UTC.
        job: Number of the SLURM job, empty outside of one.
        restart: How often SLURM had started that job again.
    """

    pid: int
    host: str
    born: str
    started: str
    job: str
    restart: int

    def __str__(self) -> str:
        age = datetime.now(timezone.utc) - datetime.fromisoformat(self.started)
        return f"process {self.pid} on {self.host}, started {timedelta(seconds=round(age.total_seconds()))} ago"

    def is_dead(self, me: Holder) -> bool:
        """Whether it is known to have ended: of another host's processes only those that SLURM has started anew."""
        if me.job and me.job == self.job and me.restart > self.restart:
            return True
        return me.host == self.host and _born(self.pid) != self.born


def take_lock(path: Path, folder: Path) -> str | None:
    """Lock ``folder`` by the file ``path`` for this process until `release_lock`; folders on the way are made.

    Returns:
        A remark if the lock of a dead process was taken over, else None.

    Raises:
        RunFolderError: If a live process, or one on another host, holds the lock; or if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(path) as file:
            holder, me = _read(file), _me()
            if holder is not None and not holder.is_dead(me) and not _is_same(holder, me):
                raise RunFolderError(
                    f"another run writes in {folder}: {holder}. Wait for it, or choose another folder "
                    f"(the logger's, or trainer.default_root_dir); if you know that it has ended, delete {path}."
                )
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(asdict(me)).encode(), 0)
            os.fsync(file)
    except OSError as error:
        raise RunFolderError(
            f"the run cannot write in {path.parent}: {error.strerror}. Choose another folder."
        ) from error
    if holder is None or _is_same(holder, me):
        return None
    return f"took over {path} from {holder}: that run has died without removing its lock."


def release_lock(path: Path) -> None:
    """Remove the lock of this process, if it is there; another's stays."""
    if not path.exists():
        return
    with _opened(path) as file:
        holder = _read(file)
        if holder is None or _is_same(holder, _me()):
            path.unlink()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The lock file, open, while nobody else reads or changes it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):  # else its holder removed it while we waited
                yield file
                return
        finally:
            os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _read(file: int) -> Holder | None:
    """Who holds the lock; nobody if the file is new, or was cut off by a crash while it was written."""
    try:
        return Holder(**json.loads(os.read(file, 4096)))
    except (ValueError, TypeError):
        return None


def _me() -> Holder:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    job, restart = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return Holder(os.getpid(), socket.gethostname(), _born(os.getpid()) or "", now, job, restart)


def _is_same(one: Holder, other: Holder) -> bool:
    return replace(one, started="") == replace(other, started="")


def _born(pid: int) -> str | None:
    """When a process of this host started, empty where the system does not tell; None if there is none."""
    if sys.platform == "linux":
        try:
            # After the name, which may hold anything but ends with the last parenthesis: field 3, the state, and so on.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # A zombie has ended; it only waits for its parent to look.
        return None if fields[0] in "ZX" else f"{_boot()}:{fields[19]}"
    if sys.platform == "win32":  # there, signal 0 is Ctrl-C
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it lives, and is somebody else's
    return ""


def _boot() -> str:
    """Which start of the machine this is: ticks and process numbers begin anew with each."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
