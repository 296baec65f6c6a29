"""A PostgreSQL server of a test, with the programs of the system."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support import warm

DEBIAN = "/usr/lib/postgresql"
"""Below it Debian keeps the programs of each version, off the PATH."""


def program(name: str) -> str | None:
    """The path of a program of PostgreSQL, of the newest version; None if it is not installed."""
    kept = sorted(Path(DEBIAN).glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    return shutil.which(name) or (str(kept[-1]) if kept else None)


MISSING = program("initdb") is None or program("pg_ctl") is None or importlib.util.find_spec("psycopg") is None
REASON = "needs the programs of PostgreSQL (Debian: postgresql) and the package psycopg"


class Server:
    """A server with a folder and a port of its own; its programs refuse to run as root, so it runs as postgres then."""

    def __init__(self) -> None:
        # Not below tmp_path, which only its owner may enter.
        self.folder = Path(tempfile.mkdtemp())
        self.port = warm.free_port()
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres")
        self._run("initdb", "-A", "trust", "-U", "postgres", "--no-sync")
        self.start()

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        """What a study gets as its storage."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        options = f"-k {self.folder} -c listen_addresses=127.0.0.1 -p {self.port} -c fsync=off"
        self._run("pg_ctl", "-o", options, "-l", str(self.folder / "log"), "-w", "start")

    def stop(self, mode: str) -> None:
        """Stop it: ``fast`` ends all connections, ``immediate`` is a crash."""
        self._run("pg_ctl", "-m", mode, "stop")

    def remove(self) -> None:
        """Stop it and delete its folder."""
        if (self.folder / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.folder)

    def _run(self, name: str, *options: str) -> None:
        user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        command = [*user, str(program(name)), "-D", str(self.folder), *options]
        # The server keeps what it inherits, so its output is no pipe. Its folder is one that its user may enter.
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder)
