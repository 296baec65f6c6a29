"""Scripts that start processes of their own, run to their end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tests.support import toys


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launched(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """What ``python arguments`` did; all its processes are gone when this returns."""
    settings = {
        "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(toys.ROOT)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MASTER_PORT": free_port(),
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env=os.environ | settings | environment,
    )


def run(*arguments: object, **environment: str) -> None:
    """``python arguments``, which must end with code 0."""
    done = launched(*arguments, **environment)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
