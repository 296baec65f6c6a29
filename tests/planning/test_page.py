"""A page has 40 lines of 80 columns at most, and no line of it is cut."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import lightning_lora as ll
from lightning_lora.planning.advice.page import COLUMNS, DISAGREE, LINES
from lightning_lora.planning.plan import Plan
from lightning_lora.planning.reason import Reason
from tests.planning.test_plan import Tensors
from tests.support import toys

pytestmark = [*toys.expected_warnings, pytest.mark.filterwarnings("ignore:rank [0-9]+ is more than")]

NOTE = "a note that takes several lines, because it says at length what else there is to know " * 3


@pytest.fixture(scope="module")
def plan() -> Plan:
    return ll.plan(toys.Plain(), Tensors(torch.arange(64) % 2), calibrate=False)


CROWDED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "a long note": {"notes": (NOTE,)},
    "many notes": {"notes": (NOTE, NOTE, NOTE, NOTE)},
    "a long verdict": {"sentence": NOTE, "notes": (NOTE,)},
    "long reasons": {"topics": (("method", Reason("rank 1", NOTE, "")), ("settings", Reason("rate", NOTE * 2, "")))},
    "not traced": {"memory": {"lora": None, "full": None}, "not_traced": {"lora": NOTE, "full": NOTE}},
    "qlora not traced": {"not_traced": {"qlora": "bitsandbytes is not installed"}, "notes": (NOTE,)},
}


@pytest.mark.parametrize("name", CROWDED)
def test_a_page_is_whole(name: str, plan: Plan) -> None:
    crowded = replace(plan, **CROWDED[name])
    lines = str(crowded).splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    text = " ".join(" ".join(lines).split())
    assert text.endswith(f"- sources disagree: {DISAGREE}")
    assert "how sure: " in text
    assert not [line for line in lines if line.endswith("...")]
    left_out = re.search(r"(\d+) more notes?: in plan.json", text)
    shown = sum(f"- {NOTE.strip()}" in text for _ in crowded.notes[: len(crowded.notes) - int((left_out or "00")[1])])
    assert shown + int((left_out or "00")[1]) == len(crowded.notes)
    for why in crowded.not_traced.values():
        assert f"not traced, because {why.strip()}" in text


def test_a_warning_stays_on_a_crowded_page(plan: Plan) -> None:
    crowded = replace(plan, topics=(*plan.topics, ("settings", Reason("rate", NOTE * 3, ""))), notes=(NOTE,))
    assert "step-starved" in str(plan)
    assert "step-starved" in str(crowded)


def test_ranks_that_add_nothing_are_not_shown(plan: Plan) -> None:
    """The layers hold rank 4 at most, so rows of 8 and more would repeat it."""
    shown = [line.split()[0] for line in str(plan).splitlines() if line[:10].isspace() and line.split()[0].isdigit()]
    assert max(map(int, shown)) == max(4, plan.settings["rank"] or 0)
