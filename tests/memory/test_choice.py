"""The fastest candidate that fits, and the settings that candidates are made from."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_lora import StepMemory
from lightning_lora.memory.candidates import MARGIN, Choice, candidates, fastest_that_fits, frugal
from lightning_lora.memory.parts import MemoryParts

ALL = ("gate", "head_rows", "activation_checkpointing")
OPEN = StepMemory()


def test_candidates_go_from_fast_to_frugal() -> None:
    found = candidates(OPEN, ALL)
    usual, last = StepMemory("recompute", 512, False), StepMemory("recompute", 512, True)
    assert found[0] == StepMemory("keep", 4096, False)
    assert found[-2:] == [usual, last]
    assert candidates(OPEN, ALL, can_recompute=False) == found[:-1]
    assert candidates(OPEN, ["gate"]) == [StepMemory("keep"), StepMemory("recompute")]
    assert frugal(found[0]) == usual
    assert frugal(OPEN) == OPEN


@pytest.mark.parametrize("made", [{"gate": "keep"}, {"head_rows": 7}, {"activation_checkpointing": True}])
def test_what_is_made_is_made_in_every_candidate(made: dict[str, Any]) -> None:
    ((name, value),) = made.items()
    found = candidates(StepMemory(**made), ALL)
    assert {getattr(each, name) for each in found} == {value}
    assert len(found) == len(set(found)) > 1


BYTES = 90, 80, 70, 60


def chosen(room: int, **how: Any) -> int:
    ways = candidates(StepMemory(gate="keep"), ALL)
    return fastest_that_fits(ways, lambda way: MemoryParts(activations=BYTES[ways.index(way)]), room, **how).place


@pytest.mark.parametrize(
    ("room", "place"), [(100, 0), (99, 1), (88, 2), (70, 2), (69, 3), (1, 3)], ids=lambda value: str(value)
)
def test_only_what_holds_more_than_it_must_leaves_a_tenth_free(room: int, place: int) -> None:
    assert chosen(room) == place


def test_a_choice_of_before_may_fill_the_room() -> None:
    assert chosen(80, first=1) == 2
    assert chosen(80, first=1, is_kept=True) == 1
    assert chosen(79, first=1, is_kept=True) == 2


def test_a_batch_may_grow_by_the_root_of_what_is_free() -> None:
    """Nine times what varies fits: rows three times as long, of which attention takes nine times the memory."""
    traced = MemoryParts(weights=60, adapters=20, optimizer=20, gradients=10, activations=80, logits=10)
    room = int((100 + 9 * 100) / (1 - MARGIN)) + 1
    assert Choice(OPEN, 0, traced, room).growth == pytest.approx(3, rel=1e-3)
    assert Choice(OPEN, 0, traced, 1).growth == 1
