"""The monitor tells full adapters from others on teachers of known rank, and nothing while the rate is high (V18)."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora.capacity.reading import CapacityReading, GroupReading
from tests.capacity.teacher import Kind, monitored
from tests.support import toys

pytestmark = toys.expected_warnings
FULL: list[tuple[Kind, int]] = [("flat", 1), ("flat", 4), ("power law", 4), ("power law", 8)]
OTHERS: list[tuple[Kind, int]] = [("flat", 8), ("flat", 16), ("flat", 48), ("power law", 32), ("power law", 48)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), FULL)
def test_full_adapters_are_saturated_after_the_learning_rate_has_decayed(kind: Kind, rank: int, tmp_path: Path) -> None:
    monitor = monitored(tmp_path, kind, rank)
    assert monitor.verdict == "SATURATED"
    assert monitor.reading.groups["layer"].state == "full"
    assert "RankProbe" in monitor.reading.sentence()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), OTHERS)
def test_adapters_with_enough_rank_are_not(kind: Kind, rank: int, tmp_path: Path) -> None:
    assert monitored(tmp_path, kind, rank).verdict == ("UNDETERMINED" if (kind, rank) == ("flat", 8) else "SPARE")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), [*FULL, ("flat", 16)])
def test_a_constant_learning_rate_gives_no_verdict(kind: Kind, rank: int, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no learning-rate schedule"):
        monitor = monitored(tmp_path, kind, rank, decays=False, count=4096)
    assert monitor.verdict == "UNDETERMINED"
    assert "has not decayed" in monitor.reading.sentence()


SETTLED = CapacityReading(
    rate=0.01, loss=1.0, half_loss=1.5, bare_loss=2.0, gain_error=0.01, capture=0.1, capture_low=0.0, capture_high=0.2
)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"capture_rate": 0.01}, "SATURATED"),
        ({"capture_rate": 0.01, "rate": 0.2}, "UNDETERMINED"),
        ({"capture_rate": 0.5}, "UNDETERMINED"),
        ({"capture_rate": 0.01, "capture_high": 0.5}, "UNDETERMINED"),
        ({"capture_high": None}, "UNDETERMINED"),
        ({"half_loss": 1.019}, "SPARE"),
        ({"half_loss": 1.021}, "UNDETERMINED"),
        ({"half_loss": 1.019, "rate": 0.11}, "UNDETERMINED"),
        ({"half_loss": 0.9}, "SPARE"),
        ({"gain_error": 0.6}, "UNDETERMINED"),
        ({"bare_loss": 0.5, "capture_rate": 0.01}, "UNDETERMINED"),
        ({"loss": None}, "UNDETERMINED"),
    ],
)
def test_a_verdict_follows_from_the_numbers(changes: dict[str, float | None], verdict: str) -> None:
    reading = CapacityReading.from_dict(SETTLED.to_dict() | changes)
    assert reading.verdict == verdict
    assert reading.sentence().startswith(f"capacity: {verdict}")


def test_the_sentence_names_full_and_idle_groups() -> None:
    full, idle = GroupReading(4, 2, 3, 0.9, 0.3, 0.1, 0.2), GroupReading(4, 2, 3, 0.001)
    groups = {"layer 11 mlp": full, "layer 2 attention": idle, "layer 3 mlp": GroupReading(4, 2, 3, 0.1, 0.01)}
    reading = CapacityReading.from_dict(
        SETTLED.to_dict() | {"capture_rate": 0.01, "groups": {name: group.__dict__ for name, group in groups.items()}}
    )
    assert "layer 11 mlp is full, layer 2 attention is idle" in reading.sentence()
    assert [group.state for group in reading.groups.values()] == ["full", "idle", "spare"]
