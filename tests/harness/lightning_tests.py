"""Runs Lightning's own tests as they are and with LoRA in their models, and lists where the two differ.

`python -m tests.harness.lightning_tests CHECKOUT` takes a checkout of the tag of the installed Lightning. It ends with
code 1 if a test that passes as it is does not pass with us and is not in `lightning_expected.yaml`, or if a listed one
passes. Tests that do not pass as they are, for lack of a GPU or a package, do not count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.harness.outcomes import DIED, NOT_RUN, VARIABLE, read_outcomes

REPOSITORY = Path(__file__).parents[2]
EXPECTED = Path(__file__).with_name("lightning_expected.yaml")
FOLDER = "tests_pytorch"
RECORD, WITH_LORA = "tests.harness.outcomes", "tests.harness.with_lora"


@dataclass(frozen=True)
class Comparison:
    """What tests did as they are and with us.

    Args:
        kinds: For each test ``"same"`` (passes both times), ``"expected"`` (listed), ``"fault"`` (fails with us and is
            not listed) or ``"plain"`` (does not pass as it is).
        stale: Listed names whose tests all pass with us.
    """

    kinds: dict[str, str]
    stale: list[str]

    @property
    def faults(self) -> list[str]:
        """Tests that fail with us and are not listed."""
        return [test for test, kind in self.kinds.items() if kind == "fault"]

    def table(self, depth: int = 3) -> str:
        """Counts by folder, as text."""
        rows: dict[str, Counter[str]] = {}
        for test, kind in self.kinds.items():
            rows.setdefault("/".join(test.partition("::")[0].split("/")[1:depth]), Counter())[kind] += 1
        rows["all"] = sum(rows.values(), Counter())
        head = f"{'':<34} passes both  differs as listed  fault  does not pass as it is"
        lines = [
            f"{n:<34} {c['same']:>11}  {c['expected']:>17}  {c['fault']:>5}  {c['plain']:>22}" for n, c in rows.items()
        ]
        return "\n".join([head, *lines])


def compare(plain: Mapping[str, str], ours: Mapping[str, str], expected: Iterable[str]) -> Comparison:
    """Compare the outcomes of the same tests.

    Args:
        plain: Outcome by test id, as the tests are.
        ours: The same with us; a test that is missing here counts as failed.
        expected: Test ids that may fail with us; one without its ``[parameters]`` stands for all of them.
    """
    expected = list(expected)
    kinds, failing = {}, set()
    for test, outcome in plain.items():
        names = {test, test.partition("[")[0]} & set(expected)
        if outcome != "passed":
            kinds[test] = "plain"
        elif ours.get(test) == "passed":
            kinds[test] = "same"
        else:
            kinds[test] = "expected" if names else "fault"
            failing |= names
    run = {name for test, kind in kinds.items() if kind != "plain" for name in (test, test.partition("[")[0])}
    return Comparison(kinds, [name for name in expected if name in run and name not in failing])


def read_expected() -> dict[str, str]:
    """The reason of each expected difference, by test id."""
    return {test: entry["reason"] for entry in yaml.safe_load(EXPECTED.read_text()) for test in entry["tests"]}


def run_tests(tests: Path, select: Sequence[str], outcomes: Path, plugins: Sequence[str], timeout: float) -> None:
    """Run pytest until each selected test has an outcome; a test at which the process dies is not run again.

    Args:
        tests: The folder from which the tests are imported.
        select: Folders, files or test ids, relative to it.
        outcomes: The file for outcomes; what pytest prints goes beside it.
        plugins: Modules to load as plugins.
        timeout: Seconds for one test.
    """
    loaded = [word for plugin in plugins for word in ("-p", plugin)]
    command = [sys.executable, "-m", "pytest", *loaded, "-p", "no:cacheprovider", "-q", "--tb=short", "--rootdir=."]
    command += [f"--timeout={timeout:g}", "--continue-on-collection-errors", *select]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {VARIABLE: str(outcomes), "PYTHONPATH": path}
    while True:
        before = read_outcomes(outcomes)
        with outcomes.with_suffix(".log").open("a") as log:
            subprocess.run(command, cwd=tests, env=environment, stdout=log, stderr=log, check=False)
        after = read_outcomes(outcomes)
        if NOT_RUN not in after.values() or _num_done(before) == _num_done(after):
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and compare; returns the exit code."""
    given = _parser().parse_args(arguments)
    tests = given.checkout.resolve() / "tests"
    if not (tests / FOLDER).is_dir():
        print(f"error: {given.checkout} has no folder tests/{FOLDER}: give a checkout of Lightning.", file=sys.stderr)
        return 2
    select = [f"{FOLDER}/{name}" for name in given.select or [""]]
    out = given.out or Path(tempfile.mkdtemp(prefix="lightning-tests-"))
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"outcomes and logs: {out}", flush=True)
    run_tests(tests, select, out / "plain.jsonl", [RECORD], given.timeout)
    run_tests(tests, select, out / "ours.jsonl", [RECORD, WITH_LORA], given.timeout)
    result = compare(read_outcomes(out / "plain.jsonl"), read_outcomes(out / "ours.jsonl"), read_expected())
    print(result.table())
    for test in result.faults:
        print(f"fails with us only: {test}")
    for name in result.stale:
        print(f"listed in {EXPECTED.name}, but passes: {name}")
    return int(bool(result.faults or result.stale))


def _num_done(outcomes: Mapping[str, str]) -> int:
    return sum(outcome not in (NOT_RUN, DIED) for outcome in outcomes.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of Lightning")
    parser.add_argument("--select", nargs="+", help=f"folders, files or test ids below tests/{FOLDER}; by default all")
    parser.add_argument("--out", type=Path, help="folder for outcomes and logs; a run that was cut off goes on there")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one test (default: 120)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
