"""`docs/evidence/lightning.md` has a row for everything of the installed Lightning, and names tests that exist."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from lightning.pytorch import Trainer, accelerators, callbacks, loggers, plugins, profilers, strategies, tuner
from lightning.pytorch.plugins import environments

from tests.support import toys

TABLE = (toys.ROOT / "docs" / "evidence" / "lightning.md").read_text()
ROWS = [line.strip("|").split(" | ") for line in TABLE.splitlines() if line.startswith("| `")]
NAMED = [name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])]


def classes(room: Any) -> set[str]:
    """Public classes of a package of Lightning, without those it keeps to explain that they are gone."""
    return {
        name
        for name, found in vars(room).items()
        if inspect.isclass(found) and name[0] != "_" and "_graveyard" not in found.__module__
    }


@pytest.mark.parametrize(
    "room", [callbacks, strategies, plugins, environments, loggers, profilers, tuner, accelerators], ids=str
)
def test_every_public_class_has_a_row(room: Any) -> None:
    assert classes(room) - set(NAMED) == set()
    assert len(classes(room)) >= (1 if room is tuner else 5)


def test_every_registered_strategy_has_a_row() -> None:
    registry: Any = strategies.StrategyRegistry
    assert {"ddp", "fsdp"} < set(registry.available_strategies())
    assert set(registry.available_strategies()) - set(NAMED) == set()


def test_every_argument_of_the_trainer_has_a_row() -> None:
    arguments = list(inspect.signature(Trainer).parameters)
    assert {"strategy", "precision"} < set(arguments)
    assert set(arguments) - set(NAMED) == set()


def test_no_name_has_two_rows() -> None:
    assert sorted(NAMED) == sorted(set(NAMED))


def test_every_row_names_a_test_or_says_why_there_is_none() -> None:
    without = [row for row in ROWS if "::test_" not in row[2]]
    assert not [row[0] for row in without if not re.search("not run|base classes|every test", " ".join(row))]
    refused = [row for row in ROWS if row[1].startswith("refused")]
    assert refused
    assert not [row[0] for row in refused if '"' not in row[1] or "::test_" not in row[2]]


def test_the_tests_that_it_names_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", TABLE)
    assert len(named) > 30
    missing = [f"{path}::{test}" for path, test in named if f"def {test}(" not in (toys.ROOT / path).read_text()]
    assert not missing
