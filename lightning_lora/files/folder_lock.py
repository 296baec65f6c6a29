"""A lock file that names the process which writes in a folder, so that no second process writes there.

The file holds process number, host and start. It is read, judged and replaced under a short ``flock``, so only one of
two processes wins that start at the same moment, or find the same stale lock.
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

if sys.platform == "win32":  # there is no flock, only the file
    fcntl: Any = None
else:
    import fcntl


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a lock.

    Args:
        born: Start of the process in the system's own ticks, to tell it from a later process with the same number.
        started: Time when the lock was taken, ISO 8601 in UTC.
        job: Number of the SLURM job; empty outside SLURM.
        restart: Number of times SLURM had restarted the job.
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

    def is_dead(self, me: LockHolder) -> bool:
        """Whether the process has surely ended. On another host this is known only if SLURM restarted its job here."""
        if me.job and me.job == self.job and me.restart > self.restart:
            return True
        return me.host == self.host and _start_ticks(self.pid) != self.born


def take_lock(path: Path, folder: Path) -> str | None:
    """Lock ``folder`` for this process until `release_lock`.

    Args:
        path: The lock file; missing parent folders are made.

    Returns:
        A sentence for the user if the lock of a dead process was taken over, else None.

    Raises:
        RunFolderError: If a live process, or one on another host, holds the lock; or if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(path) as file:
            holder, me = _read(file), _this_process()
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


def is_locked(path: Path) -> bool:
    """Whether a process that may be alive holds the lock; the file is only read."""
    try:
        return not LockHolder(**json.loads(path.read_text(encoding="utf-8"))).is_dead(_this_process())
    except (OSError, ValueError, TypeError):
        return False


def release_lock(path: Path) -> None:
    """Remove the lock file if this process holds it; the lock of another process stays."""
    if not path.exists():
        return
    with _opened(path) as file:
        holder = _read(file)
        if holder is None or _is_same(holder, _this_process()):
            path.unlink()


def drop_foreign_lock(path: Path) -> None:
    """Remove a lock that another machine has left, where it is known otherwise that its process has ended."""
    if not path.exists():
        return
    with _opened(path) as file:
        holder = _read(file)
        if holder is not None and holder.host != _this_process().host:
            path.unlink()


def process_name() -> str:
    """A text that names this process among those of all machines, for `is_dead_process`."""
    return json.dumps(asdict(replace(_this_process(), started="", job="", restart=0)))


def is_dead_process(name: str) -> bool:
    """Whether a process that `process_name` has named has surely ended; False for those of other machines."""
    try:
        return LockHolder(**json.loads(name)).is_dead(_this_process())
    except (ValueError, TypeError):
        return False


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open the lock file and keep others from reading or changing it, within the context."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):  # otherwise its holder removed it while we waited
                yield file
                return
        finally:
            os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _read(file: int) -> LockHolder | None:
    """The holder of the lock; None if the file is new, or was cut off by a crash while it was written."""
    try:
        return LockHolder(**json.loads(os.read(file, 4096)))
    except (ValueError, TypeError):
        return None


def _this_process() -> LockHolder:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    job, restart = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return LockHolder(os.getpid(), socket.gethostname(), _start_ticks(os.getpid()) or "", now, job, restart)


def _is_same(one: LockHolder, other: LockHolder) -> bool:
    """Whether both are the same process, whenever it took the lock."""
    return replace(one, started="") == replace(other, started="")


def _start_ticks(pid: int) -> str | None:
    """The start of a process on this host, empty if the system does not tell; None if there is no such process."""
    if sys.platform == "linux":
        try:
            # The name may hold anything, but ends with the last parenthesis. Field 3, the state, follows.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # A zombie has ended; it only waits for its parent to ask for its exit code.
        return None if fields[0] in "ZX" else f"{_boot_id()}:{fields[19]}"
    if sys.platform == "win32":  # there, signal 0 is Ctrl-C
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it is alive, and belongs to another user
    return ""


def _boot_id() -> str:
    """The id of this start of the machine. Ticks and process numbers begin again with every start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
