from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_lora.errors import ConfigError
from lightning_lora.study.matched.record import read_results
from lightning_lora.study.matched.store import Store
from tests.study.matched import planted
from tests.support import warm

KILLS = 10


def check_kills(folder: Path, url: str) -> None:
    """Two workers share a study, and each of ten kills is followed by a new worker."""
    draw = random.Random(4)

    def begin() -> warm.Process:
        return warm.Process(planted.__file__, str(folder), url, "1.0")

    workers = [begin(), begin()]
    for _ in range(KILLS):
        time.sleep(draw.uniform(0.05, 0.35))
        victim = draw.randrange(2)
        workers[victim].kill_all()
        workers[victim] = begin()
    assert [worker.wait(60) for worker in workers] == [0, 0]
    plan, known = planted.finished(planted.spec(seeds=8), planted.planted_loss)
    runs = Store(url, "planted").statuses()
    assert {run.cell for run in runs} == set(plan.cells)
    assert {run.state for run in runs} == {"done"}
    assert {run.cell.key: run.loss for run in runs} == {key: run.loss for key, run in known.items()}
    assert len(read_results(folder / "results.csv")) == len(plan.cells)
    begun = Counter(json.loads(line)[0] for line in (folder / "begun.jsonl").read_text().splitlines())
    assert sum(begun.values()) <= len(plan.cells) + KILLS, "a kill costs the one run that it interrupts"
    assert json.loads((folder / "verdicts.json").read_text())[0]["verdict"] == "matches"


def test_two_workers_that_are_killed_ten_times_lose_no_run_and_record_none_twice(tmp_path: Path) -> None:
    check_kills(tmp_path, f"sqlite:///{tmp_path / 'study.sqlite'}")


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server of this test; its tools refuse to run as root."""
    tools = [shutil.which(name) for name in ("initdb", "pg_ctl")]
    if None in tools or importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs the programs of PostgreSQL and the package psycopg")
    # Not below tmp_path, which only its owner may enter.
    port, data = warm.free_port(), Path(tempfile.mkdtemp())
    user: list[str] = []
    if os.getuid() == 0:
        user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(data, "postgres")
    initdb, pg_ctl = map(str, tools)
    subprocess.run([*user, initdb, "-A", "trust", "-U", "postgres", "-D", data], check=True, capture_output=True)
    options = f"-k {data} -c listen_addresses=127.0.0.1 -p {port} -c fsync=off"
    start = [*user, pg_ctl, "-D", data, "-o", options, "-l", data / "log", "-w", "start"]
    subprocess.run(start, check=True, stdout=subprocess.DEVNULL)
    yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
    subprocess.run([*user, pg_ctl, "-D", data, "-m", "immediate", "stop"], check=True, capture_output=True)
    shutil.rmtree(data)


@pytest.mark.slow
def test_workers_on_a_server_lose_no_run_and_record_none_twice(tmp_path: Path, server: str) -> None:
    check_kills(tmp_path, server)


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_is_one_error_without_its_password() -> None:
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs the package psycopg")
    with pytest.raises(ConfigError, match=r"postgresql://me:\*\*\*@127.0.0.1:1/s cannot be reached"):
        Store("postgresql://me:secret@127.0.0.1:1/s", "s")
