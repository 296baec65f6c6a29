"""Files and folders that appear on disk whole or not at all.

Everything is written under a temporary name beside its target, pushed to the disk (``fsync``) and then renamed. After
a crash, a kill or a full disk at any moment, a reader finds the old version or the new one, never a mix. Temporary
names are ``.{name}.{pid}.{random}.tmp``; the next write of the same target removes those that dead processes left.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lightning_lora.errors import OutputPlaceError

# The random part of a temporary name starts with host and process. So a process number from another machine of a shared
# disk, or one used again after a container restart, is not taken for a live or a dead writer here.
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_PROCESS = secrets.token_hex(4)
# Target, process number, host, process, suffix.
_LEFTOVER = re.compile(r"\.(.+)\.(\d+)\.([0-9a-f]{8})([0-9a-f]{8})[0-9a-f]{8}\.(tmp|old)")
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, keep_link: bool = True) -> Generator[BinaryIO, None, None]:
    """Open a file for writing that replaces ``path`` in one step when the block ends without an error.

    If the block raises, the old file stays as it was and nothing is left behind. Missing parent folders are created.
    A new file has the permissions that a plain ``open(path, "wb")`` gives; a replaced one keeps its own.

    Args:
        keep_link: What to replace if ``path`` is a symbolic link. True: the file it points to. False: the link itself;
            the file it points to stays as it was.

    Yields:
        The temporary file, open for writing bytes. The caller may seek in it, and must not close it.

    Raises:
        OSError: If the folder is not writable or the disk is full; the old file is untouched.
    """
    path = _prepare(path, keep_link)
    temporary = _temporary(path)
    file = open(temporary, "xb")  # noqa: SIM115 - closed below, before the rename
    try:
        with file:
            yield file
            file.flush()
            _keep_mode(path, temporary)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace ``path`` by a file with ``text`` in one step, as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replaces: str) -> Generator[Path, None, None]:
    """Make a folder that replaces ``path`` in one step when the block ends without an error.

    The old folder is replaced as a whole: files in it that the block does not write again are gone. If the block
    raises, the old folder stays as it was. On a file system that cannot exchange two folders, ``path`` is absent for
    an instant. A process killed in that instant leaves the old folder under another name, and the next write restores
    it first.

    Args:
        path: The folder to create or replace. Missing parent folders are created.
        replaces: Name of a file that every folder of this kind holds. A non-empty folder without it is never replaced.

    Yields:
        An empty temporary folder beside ``path`` to write into.

    Raises:
        AdapterFileError: If ``path`` is a file, or a non-empty folder without ``replaces``.
        OSError: If the parent is not writable or the disk is full; the old folder is untouched.
    """
    path = _prepare(path)
    _check_replaceable(path, replaces)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        _fsync_tree(temporary)
        _keep_mode(path, temporary)
        _check_replaceable(path, replaces)
        _swap_in(temporary, path)
        _fsync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # the failed new one, or after an exchange the old one


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that dead writers have left in ``folder``, with a warning per target."""
    for name in sorted({match[1] for entry in folder.iterdir() if (match := _LEFTOVER.fullmatch(entry.name))}):
        _remove_leftovers(folder / name)


def _prepare(path: str | os.PathLike[str], keep_link: bool = True) -> Path:
    """The real path of a target, after making its parent folders and removing temporary copies of dead writers."""
    path = Path(path)
    path = Path(os.path.realpath(path)) if keep_link else Path(os.path.realpath(path.parent)) / path.name
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _fsync_folder(folder.parent)
    _remove_leftovers(path)
    return path


def _temporary(path: Path, suffix: str = "tmp") -> Path:
    """A new temporary name beside ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.{_HOST}{_PROCESS}{secrets.token_hex(4)}.{suffix}")


def _remove_leftovers(path: Path) -> None:
    removed = 0
    for entry in sorted(path.parent.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or match[1] != path.name or match[3] != _HOST or _is_alive(int(match[2]), match[4]):
            continue
        if match[5] == "old" and not path.exists():
            os.rename(entry, path)
            warnings.warn(f"put {path} back: a write of it was killed half-way", stacklevel=5)
            continue
        with suppress(OSError):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            removed += 1
    if removed:
        warnings.warn(f"removed {removed} unfinished temporary copies of {path} left by killed writers", stacklevel=5)


def _is_alive(pid: int, process: str) -> bool:
    if pid == os.getpid():
        return process == _PROCESS
    if sys.platform == "win32":  # there, signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _check_replaceable(path: Path, replaces: str) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputPlaceError(f"{path} is a file, not a folder; delete it or choose another path.")
    if any(path.iterdir()) and not (path / replaces).is_file():
        raise OutputPlaceError(
            f"{path} is not empty and holds no {replaces}, so it is not ours to replace; "
            "choose a new path or empty the folder yourself."
        )


def _swap_in(new: Path, path: Path) -> None:
    """Move ``new`` to ``path``; afterwards ``new`` is the old folder, or gone."""
    if not path.exists():
        os.rename(new, path)
    elif not _exchange(new, path):
        aside = _temporary(path, "old")
        os.rename(path, aside)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(aside, path)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one system call; False if the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library older than glibc 2.28
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _keep_mode(path: Path, new: Path) -> None:
    """Give ``new`` the permissions of ``path``: a private file or folder must not become readable by others."""
    with suppress(FileNotFoundError):
        os.chmod(new, stat.S_IMODE(os.stat(path).st_mode))


def _fsync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not os.path.islink(file_path := os.path.join(parent, name)):
                with open(file_path, "rb") as file:
                    os.fsync(file.fileno())
        _fsync_folder(parent)


def _fsync_folder(folder: str | os.PathLike[str]) -> None:
    if sys.platform == "win32":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some network file systems have no such operation
            raise
    finally:
        os.close(descriptor)
