from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

from lightning_lora.study.matched.record import read_results
from lightning_lora.study.matched.store import Store
from tests.study.matched import planted
from tests.support import warm


def test_two_workers_that_are_killed_ten_times_lose_no_run_and_record_none_twice(tmp_path: Path) -> None:
    url, draw = f"sqlite:///{tmp_path / 'study.sqlite'}", random.Random(4)
    begin = lambda: warm.Process(planted.__file__, str(tmp_path), url, "1.0")  # noqa: E731
    workers = [begin(), begin()]
    for _ in range(10):
        time.sleep(draw.uniform(0.05, 0.35))
        victim = draw.randrange(2)
        workers[victim].kill_all()
        workers[victim] = begin()
    for worker in workers:
        assert worker.wait(60) == 0
    plan, _ = planted.finished(planted.spec(seeds=8), planted.planted_loss)
    runs = Store(url, "planted").statuses()
    assert {run.cell for run in runs} == set(plan.cells)
    assert {run.state for run in runs} == {"done"}
    assert len(read_results(tmp_path / "results.csv")) == len(plan.cells)
    begun = Counter(json.loads(line)[0] for line in (tmp_path / "begun.jsonl").read_text().splitlines())
    assert sum(begun.values()) <= len(plan.cells) + 10, "a kill costs the one run that it interrupts"
    assert json.loads((tmp_path / "verdicts.json").read_text())[0]["verdict"] == "matches"
