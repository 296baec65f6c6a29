"""A pattern is a name, a dotted suffix, or a glob."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.errors import words
from lightning_lora.lora import config, patterns
from lightning_lora.lora.layers import adapted
from lightning_lora.lora.patterns import first_match, matches, matches_any

NAME = "model.layers.0.mlp.up_proj"
SEGMENTS = st.lists(st.sampled_from(["model", "layers", "0", "11", "q_proj", "up_proj"]), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (NAME, True),
        ("up_proj", True),
        ("mlp.up_proj", True),
        ("0.mlp.up_proj", True),
        ("*.mlp.*", True),
        ("model.*", True),
        ("*", True),
        ("*up_proj", True),
        ("*.layers.[0-3].*", True),
        ("*.layers.[!1].*", True),
        ("model.layers.?.mlp.up_proj", True),
        ("proj", False),
        ("p_proj", False),
        ("mlp", False),
        ("layers.0", False),
        ("model", False),
        ("mlp.*", False),
        ("layers.*", False),
        ("UP_PROJ", False),
        ("*.layers.[1-3].*", False),
        (".*up_proj$", False),
        ("", False),
    ],
)
def test_a_pattern_is_a_name_a_suffix_or_a_glob(pattern: str, expected: bool) -> None:
    assert matches(NAME, pattern) is expected


@given(SEGMENTS, st.integers(0, 5))
def test_every_dotted_suffix_matches_and_no_cut_one_does(segments: list[str], start: int) -> None:
    name = ".".join(segments)
    suffix = ".".join(segments[start % len(segments) :])
    assert matches(name, suffix)
    assert matches(f"outer.{name}", suffix)
    assert not matches(f"x{suffix}", suffix)


def test_the_first_pattern_that_matches_wins() -> None:
    assert first_match(NAME, {"down_proj": 1, "*.mlp.*": 2, "up_proj": 3}, 0) == 2
    assert first_match(NAME, {"up_proj": 3, "*.mlp.*": 2}, 0) == 3
    assert first_match(NAME, {"down_proj": 1}, 0) == 0
    assert first_match(NAME, {}, None) is None


def test_any_of_the_patterns_is_enough() -> None:
    assert matches_any(NAME, ["q_proj", "up_proj"])
    assert not matches_any(NAME, ["q_proj", "down_proj"])
    assert not matches_any(NAME, [])


@pytest.mark.parametrize("module", [patterns, config, words, adapted], ids=lambda module: module.__name__)
def test_the_documented_examples_hold(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0
