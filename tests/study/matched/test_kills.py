from __future__ import annotations

import json
import random
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

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
    with closing(Store(url, "planted")) as store:
        runs = store.statuses()
    assert {run.cell for run in runs} == set(plan.cells)
    assert {run.state for run in runs} == {"done"}
    assert {run.cell.key: run.loss for run in runs} == {key: run.loss for key, run in known.items()}
    assert len(read_results(folder / "results.csv")) == len(plan.cells)
    begun = Counter(json.loads(line)[0] for line in (folder / "begun.jsonl").read_text().splitlines())
    assert sum(begun.values()) <= len(plan.cells) + KILLS, "a kill costs the one run that it interrupts"
    assert json.loads((folder / "verdicts.json").read_text())[0]["verdict"] == "matches"


def test_two_workers_that_are_killed_ten_times_lose_no_run_and_record_none_twice(tmp_path: Path) -> None:
    check_kills(tmp_path, f"sqlite:///{tmp_path / 'study.sqlite'}")
