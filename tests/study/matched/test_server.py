"""A study whose workers share a PostgreSQL server, which the tests start."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from lightning_lora.errors import ConfigError
from lightning_lora.study.matched import database
from lightning_lora.study.matched.store import Store
from tests.study.matched import planted, postgres
from tests.study.matched.test_kills import check_kills
from tests.study.matched.test_store import CELLS, FIXED
from tests.support import warm

needs_server = pytest.mark.skipif(postgres.MISSING, reason=postgres.REASON)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[postgres.Server]:
    server = postgres.Server()
    yield server
    server.remove()


@pytest.fixture
def server(shared_server: postgres.Server) -> Iterator[postgres.Server]:
    """A server that runs, with no study."""
    yield shared_server
    if not (shared_server.folder / "postmaster.pid").exists():
        shared_server.start()
    with closing(Store(shared_server.url(), "s")) as store, store._database.transaction() as transaction:
        transaction.execute("DROP TABLE IF EXISTS ll_study, ll_cell, ll_result")


@pytest.fixture
def opened(server: postgres.Server) -> Iterator[Callable[..., Store]]:
    """Begins or joins a study; its connections are closed after the test."""
    with ExitStack() as stack:

        def begin(name: str = "s") -> Store:
            store = stack.enter_context(closing(Store(server.url(), name)))
            store.open(FIXED)
            return store

        yield begin


@pytest.mark.slow
@needs_server
def test_workers_that_are_killed_lose_no_run_and_record_none_twice(tmp_path: Path, server: postgres.Server) -> None:
    check_kills(tmp_path, server.url())


@pytest.mark.slow
@needs_server
def test_workers_wait_for_a_server_that_restarts(tmp_path: Path, server: postgres.Server) -> None:
    workers = [warm.Process(planted.__file__, str(tmp_path), server.url(), "60.0") for _ in range(2)]
    begun, until = tmp_path / "begun.jsonl", time.monotonic() + 60
    while not begun.exists() or len(begun.read_text().splitlines()) < 2:  # a start without a server is refused
        assert time.monotonic() < until
        time.sleep(0.02)
    for mode in ("fast", "immediate", "fast"):
        time.sleep(0.4)
        server.stop(mode)
        server.start()
    assert [worker.wait(60) for worker in workers] == [0, 0]
    plan, known = planted.finished(planted.spec(seeds=8), planted.planted_loss)
    with closing(Store(server.url(), "planted")) as store:
        runs = store.statuses()
    assert {run.cell for run in runs} == set(plan.cells)
    assert {run.cell.key: run.loss for run in runs} == {key: run.loss for key, run in known.items()}
    assert len((tmp_path / "begun.jsonl").read_text().splitlines()) == len(plan.cells), "no run is done twice"


@needs_server
def test_a_claim_outlives_a_restart(server: postgres.Server, opened: Callable[..., Store]) -> None:
    store = opened()
    store.add(CELLS[:1])
    claim = store.claim()
    assert claim is not None
    server.stop("immediate")
    server.start()
    assert store.beat(claim)
    assert store.finish(claim, planted.outcome(1.0))
    assert [run.loss for run in store.statuses()] == [pytest.approx(1.0)]


@needs_server
def test_a_server_that_goes_away_in_a_transaction_is_asked_once_more(
    opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = opened(), opened()
    give_up = Store._give_up
    pid = store._database._connection.info.backend_pid

    def cut(self: Store, transaction: database.Transaction) -> None:
        monkeypatch.setattr(Store, "_give_up", give_up)
        with other._database.transaction() as mine:
            mine.execute("SELECT pg_terminate_backend(?)", [pid])
        give_up(self, transaction)

    store.add(CELLS)
    monkeypatch.setattr(Store, "_give_up", cut)
    claim = store.claim()
    assert claim is not None
    assert claim.attempt == 1
    assert [run.state for run in store.statuses()] == ["running", "ready", "ready"]


@needs_server
def test_a_server_that_stays_away_is_one_error(
    server: postgres.Server, opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "WAIT_SECONDS", 0)
    store = opened()
    server.stop("fast")
    with pytest.raises(ConfigError, match=r"has been away for 0 s: .*Finished runs are kept: give the same command"):
        store.statuses()
    server.start()
    assert store.statuses() == []


@needs_server
def test_a_server_has_many_studies_and_refuses_a_changed_one(opened: Callable[..., Store]) -> None:
    one, other = opened(), opened("other")
    one.add(CELLS)
    assert other.statuses() == []
    with pytest.raises(ConfigError, match=r"holds another study 's': its band differ from those here"):
        one.open({"fixed": {"band": 0.01}, "arms": {"full": "a"}})


@needs_server
@pytest.mark.parametrize(
    ("database_name", "user", "message"),
    [
        ("no_such", "postgres", r'cannot be reached: .*database "no_such" does not exist\. \[LL800 '),
        ("postgres", "nobody", r'cannot be reached: .*role "nobody" does not exist\. \[LL800 '),
    ],
)
def test_a_wrong_database_or_user_is_one_error(
    server: postgres.Server, database_name: str, user: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Store(server.url(database_name, user), "s")


@pytest.mark.skipif(importlib.util.find_spec("psycopg") is None, reason="needs the package psycopg")
@pytest.mark.parametrize("url", ["postgresql://me:secret@127.0.0.1:1/s", "postgresql://me:secret@127.0.0.1:port/s"])
def test_a_server_that_cannot_be_reached_is_one_error_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"postgresql://me:\*\*\*@127.0.0.1:\w+/s cannot be reached") as error:
        Store(url, "s")
    assert "secret" not in str(error.value)
