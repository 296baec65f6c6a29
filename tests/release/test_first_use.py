"""What a new user is promised: the table names every promise and tests that exist; the first result takes a minute."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.warm import ROOT
from tests.test_bad_input import named_in

TABLE = ROOT / "docs" / "evidence" / "first_use.md"
MOST = 120
"""Seconds of a processor: a minute of two cores."""
COUNT = """
import ctypes, os, resource, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # processes that are left behind become children of this one, and are counted
code = subprocess.call(sys.argv[1:])
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print("used", used.ru_utime + used.ru_stime)
sys.exit(code)
"""
"""Runs a command, then says how many seconds of a processor it and all below it have used."""


def used(cwd: Path, *command: str, **environment: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(re.findall(r"^used (\S+)$", done.stdout, flags=re.MULTILINE)[-1])


def test_every_promise_has_a_row_with_a_test_that_exists() -> None:
    found = named_in(TABLE, "U")
    assert list(found) == [f"U{number:02d}" for number in range(1, 21)]
    for tests in found.values():
        assert tests
        for test in tests:
            file, _, name = test.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(), test


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes left behind are counted on Linux only")
def test_from_the_wheel_to_a_trained_adapter_and_a_report_it_takes_two_commands_and_a_minute(
    wheel: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    seconds = used(tmp_path, *install)
    demo = [sys.executable, "-m", "lightning_lora", "demo"]
    seconds += used(tmp_path, *demo, PYTHONPATH=str(site), OMP_NUM_THREADS="1")
    assert (tmp_path / "demo" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "demo" / "report.html").is_file()
    print(f"{seconds:.0f} s of a processor")
    assert seconds < MOST
