"""A process that is forked from the server is like an interpreter of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import toys, warm

LOOK = """
import json, os, random, signal, sys, threading, warnings
import numpy, torch
import __main__
print(json.dumps({
    "arguments": sys.argv,
    "folder": os.getcwd(),
    "variable": os.environ.get("OF_A_TEST"),
    "main": __main__.__name__ == __name__,
    "path": sys.path[0],
    "threads": threading.active_count(),
    "signals": [signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM) == 0],
    "ignored": warnings.filters[-1][0] == "ignore" and warnings.filters[-1][2] is Warning,
}))
print(json.dumps([random.random(), numpy.random.rand(), torch.rand(()).item()]), file=sys.stderr)
"""


def seen(*arguments: object, folder: Path) -> tuple[dict[str, Any], list[float]]:
    """What a process says of itself, and numbers that it draws."""
    done = warm.run(*arguments, cwd=folder, OF_A_TEST="here")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), json.loads(done.stderr)


def test_a_process_has_what_its_command_line_says(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(LOOK)
    script, numbers = seen("script.py", "a", folder=tmp_path)
    module, others = seen("-m", "script", "a", folder=tmp_path)
    code, _ = seen("-W", "ignore", "-c", LOOK, "a", folder=tmp_path)
    common = {"folder": str(tmp_path), "variable": "here", "main": True, "threads": 1, "signals": [True, True]}
    for found in (script, module, code):
        assert found.items() >= common.items()
    assert [found["path"] for found in (script, module, code)] == [str(tmp_path), str(tmp_path), ""]
    assert (script["arguments"], code["arguments"]) == (["script.py", "a"], ["-c", "a"])
    assert [found["ignored"] for found in (script, module, code)] == [False, False, True]
    assert not set(numbers) & set(others)


ENDS = [
    "pass",
    "import sys; sys.exit(3)",
    "import sys; sys.exit('words')",
    "raise ValueError('words')",
    "import os; os._exit(4)",
    "raise KeyboardInterrupt",
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "import atexit, sys; atexit.register(print, 'last'); print('first')",
    "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('last'))).start()",
]


@pytest.mark.parametrize("code", ENDS)
def test_a_process_ends_as_an_interpreter_does(code: str) -> None:
    expected = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found = warm.run("-c", code)
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_a_process_is_killed_with_what_it_has_started(tmp_path: Path) -> None:
    sleep = "import subprocess, sys; print(subprocess.Popen(['sleep', '100']).pid, flush=True); sys.stdin.read(1)"
    process = warm.Process("-c", f"{sleep}; import time; time.sleep(100)", stdout=tmp_path / "out")
    while not (tmp_path / "out").exists() or not (tmp_path / "out").read_text():
        time.sleep(0.01)
    assert process.poll() is None
    process.kill_all()
    assert process.poll() == -signal.SIGKILL
    child = Path("/proc", (tmp_path / "out").read_text().strip(), "stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_the_other_rank_is_not_waited_for_when_one_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "GRACE", 0.1)
    code = "import os, time; time.sleep(100 if os.environ['RANK'] == '0' else 0); raise ValueError('words')"
    with pytest.raises(AssertionError, match=r"(?s)rank 1: .*ValueError: words"):
        toys.run_python(code, ranks=2)
