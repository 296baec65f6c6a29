"""A pytest plugin that writes the outcome of each test into a file, line by line, so that a crash loses nothing.

Tests with an outcome in the file are not run again: a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

# Names the file; a command-line option would be unknown to the processes that tests start.
VARIABLE = "HARNESS_OUTCOMES"
NOT_RUN, DIED = "not run", "died"
_BY_WEIGHT = ("passed", "xpassed", "xfailed", "skipped", "failed")


def read_outcomes(path: Path) -> dict[str, str]:
    """The last outcome of each test in a file of this plugin, by test id."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["test"]: entry["outcome"] for entry in map(json.loads, lines)}


def pytest_configure(config: pytest.Config) -> None:
    """Know the mark of pytest-rerunfailures, which need not be installed, and record from here on."""
    config.addinivalue_line("markers", "flaky: pytest-rerunfailures would try this test again")
    config.pluginmanager.register(_Recorder(Path(os.environ[VARIABLE])))


class _Recorder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcome = "passed"
        self._why = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = {test for test, outcome in read_outcomes(self._path).items() if outcome != NOT_RUN}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]
        for item in items:
            self._write(item.nodeid, NOT_RUN)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid, "failed", report.longreprtext)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._outcome, self._why = "passed", ""
        self._write(nodeid, DIED)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = _outcome(report)
        if _BY_WEIGHT.index(outcome) > _BY_WEIGHT.index(self._outcome):
            self._outcome, self._why = outcome, report.longreprtext
        if report.when == "teardown":
            self._write(report.nodeid, self._outcome, self._why)

    def _write(self, test: str, outcome: str, why: str = "") -> None:
        with self._path.open("a") as file:
            print(json.dumps({"test": test, "outcome": outcome, "why": why[-2000:]}), file=file)


def _outcome(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    return report.outcome
