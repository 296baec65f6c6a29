from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from lightning_lora.errors import ConfigError
from lightning_lora.study.matched.cells import Cell
from lightning_lora.study.matched.store import Store
from tests.study.matched.planted import outcome

FIXED = {"fixed": {"band": 0.005}, "arms": {"full": "a"}}
CELLS = [Cell("full", 1e-4, seed, "verdict", f"{seed:016x}") for seed in range(3)]


def opened(tmp_path: Path, lease: float = 120.0, owner: str = "one") -> Store:
    store = Store(f"sqlite:///{tmp_path / 'study.sqlite'}", "s", lease)
    store.owner = owner
    store.open(FIXED)
    return store


def test_a_run_is_claimed_by_one_worker(tmp_path: Path) -> None:
    one, other = opened(tmp_path), opened(tmp_path, owner="two")
    one.add(CELLS)
    other.add(CELLS)
    claims = [store.claim() for store in (one, other, one)]
    assert [claim.cell for claim in claims if claim] == CELLS
    assert other.claim() is None


@pytest.mark.parametrize("owner", ["two", "one"], ids=["another worker", "the same worker later"])
def test_a_lost_lease_writes_nothing(tmp_path: Path, owner: str) -> None:
    slow, fast = opened(tmp_path, 0.05), opened(tmp_path, 60, owner)
    slow.add(CELLS[:1])
    first = slow.claim()
    assert first is not None
    assert slow.beat(first)
    time.sleep(0.2)
    second = fast.claim()
    assert second is not None
    assert second.attempt == 2
    assert not slow.beat(first)
    assert not slow.finish(first, outcome(1.0))
    assert not slow.fail(first, "late", True)
    assert not slow.release(first)
    assert fast.finish(second, outcome(2.0))
    (status,) = fast.statuses()
    assert (status.state, status.attempt, status.loss) == ("done", 2, pytest.approx(2.0))


def test_results_come_back_bit_by_bit(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(CELLS[:1])
    claim = store.claim()
    assert claim is not None
    written = outcome(1 / 3)
    store.finish(claim, written)
    (status,) = store.statuses()
    assert status.outcome is not None
    assert torch.equal(status.outcome.rows.loss_sum, written.rows.loss_sum)
    assert torch.equal(status.outcome.rows.selection, written.rows.selection)
    assert status.outcome.rows.tokens.dtype == torch.int64


def test_an_error_is_tried_twice_and_a_final_one_once(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(CELLS[:2])
    for reason, is_final in (("flaky", False), ("flaky", False), ("NaN", True)):
        claim = store.claim()
        assert claim is not None
        assert store.fail(claim, reason, is_final)
    assert store.claim() is None
    assert [(run.state, run.reason, run.attempt) for run in store.statuses()] == [
        ("failed", "flaky", 2),
        ("failed", "NaN", 1),
    ]


def test_a_run_that_is_killed_five_times_is_given_up(tmp_path: Path) -> None:
    store = opened(tmp_path, 0.01)
    store.add(CELLS[:1])
    claims = 0
    while store.claim() is not None:
        claims += 1
        time.sleep(0.03)
    assert claims == 5
    (status,) = store.statuses()
    assert status.state == "failed"
    assert status.reason == "killed 5 times; out of memory?"


def test_a_run_that_was_stopped_is_not_counted_as_killed(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(CELLS[:1])
    for _ in range(8):
        claim = store.claim()
        assert claim is not None
        assert store.release(claim)


def test_runs_are_done_in_the_order_in_which_they_were_asked_for(tmp_path: Path) -> None:
    store = opened(tmp_path)
    later = [Cell("full", 1e-4, seed, "verdict", f"{9 - seed:016x}") for seed in range(3, 6)]
    for asked in (CELLS[::-1], CELLS, later):
        store.add(asked)
    claims = [store.claim() for _ in range(6)]
    assert [claim.cell for claim in claims if claim] == [*CELLS[::-1], *later]


def test_arms_may_be_added_and_nothing_else_changed(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.open({"fixed": {"band": 0.005}, "arms": {"full": "a", "rank 8": "b"}})
    store.open(FIXED)
    with pytest.raises(ConfigError, match="holds another study 's': its band differ"):
        store.open({"fixed": {"band": 0.01}, "arms": {"full": "a"}})
    with pytest.raises(ConfigError, match="arm 'rank 8'"):
        store.open({"fixed": {"band": 0.005}, "arms": {"full": "a", "rank 8": "c"}})
    with pytest.raises(ConfigError, match="holds the study 's', and this one is 'other'"):
        Store(store.url, "other").open(FIXED)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/name", r"storage mysql://host/name must be sqlite:///FILE or postgresql://"),
        ("sqlite:////proc/no/study.sqlite", "cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_error(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Store(url, "s")


def test_a_file_that_is_no_database_is_one_error(tmp_path: Path) -> None:
    file = tmp_path / "study.sqlite"
    file.write_text("no database at all, but a text that is long enough to be one" * 20)
    with pytest.raises(ConfigError, match="not a database"):
        Store(f"sqlite:///{file}", "s")
