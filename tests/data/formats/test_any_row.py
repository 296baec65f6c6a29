"""Whatever a row holds, it is read or refused with a reason."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.formats.names import COLUMNS, FORMATS, KEYS
from lightning_lora.data.formats.roles import ROLES
from lightning_lora.data.records import Conversation
from tests.data.formats.reading import read

TEXTS = ["", "a", " ", "[", "[]", "{}", '[{"role": "user", "content": "a"}]', "null", "0.5", '{"name": "a"}', "\ud83d"]
OTHERS = [None, 0, 1, True, -1, 2.5, float("nan"), float("inf"), 10**400, b"x"]
INNER = [*sorted(KEYS), "label", "text", "arguments", "function", "type", "parameters", "other"]


def anything(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(6 if depth < 4 else 2)
    if kind < 2:
        return draw.choice([TEXTS, OTHERS][kind])
    if kind == 2:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(3))]
    if kind == 3:
        return {draw.choice(INNER): anything(draw, depth + 1) for _ in range(draw.randrange(4))}
    return turn(draw, depth)


def turn(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    keys = draw.choice(["role", "from"]), draw.choice(["content", "value"])
    said = "a" if draw.random() < 0.6 else anything(draw, depth + 1)
    extra = {draw.choice(INNER): anything(draw, depth + 1) for _ in range(draw.randrange(2))}
    return {keys[0]: draw.choice(sorted(ROLES)), keys[1]: said, **extra}


def row(draw: random.Random) -> dict[str, Any]:
    def value() -> Any:
        return draw.choice(["a", anything(draw), [turn(draw) for _ in range(draw.randrange(4))]])

    beside = {draw.choice(sorted(COLUMNS)): value() for _ in range(draw.randrange(3))}
    return {**{column: value() for column in draw.choice(FORMATS)}, **beside}


@pytest.mark.parametrize("seed", range(4))
def test_any_row_is_read_or_refused(seed: int) -> None:
    draw, kinds, num_read = random.Random(seed), Counter[str](), 0
    for _ in range(500):
        columns = row(draw)
        try:
            record = read(columns)
        except RowError as error:
            kinds[error.kind] += 1
            continue
        num_read += 1
        if isinstance(record, Conversation):
            assert {message["role"] for message in record.messages} <= {"system", "user", "assistant", "tool"}
            assert all(isinstance(message["content"], str) for message in record.messages)
            assert 0 < record.weight < float("inf")
            assert record.untrained <= set(range(len(record.messages)))
    assert num_read > 40
    assert 10 < len(kinds) < 100, "a kind is the same for all rows with the fault"
    assert not any(value in kind for kind in kinds for value in ("\ud83d", "inf", "0.5", "b'x'"))
