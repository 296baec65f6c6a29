from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import warm


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(warm.ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (found,) = out.iterdir()
    return found


class Installed:
    """The wheel, installed into a folder of its own, and a process that has imported the package from there."""

    def __init__(self, site: Path) -> None:
        self.site = site
        self.server = warm.Server(site)

    def python(self, *arguments: object, cwd: Path, code: int = 0) -> str:
        """What ``python *arguments`` prints; it must end with ``code``."""
        path = os.pathsep.join([str(self.site), str(warm.ROOT)])  # of processes that it starts
        done = warm.run("-W", "ignore", *arguments, cwd=cwd, forked_by=self.server, PYTHONPATH=path)
        assert done.returncode == code, done.stdout + done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    site = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    found = Installed(site)
    yield found
    found.server.close()
