"""Looking keys up gives what trying PEFT's regular expressions one by one gives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.files.adapter.peft_patterns import PatternTable, TargetedNames, is_listed


def tried_in_turn(name: str, patterns: Mapping[str, Any]) -> Any:
    """`peft.utils.get_pattern_key` and what it is used for."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), "default")


NAMES = ["layers.1.up", "layers.110.up", "layers.11.up", "up", "a.layers.1.up", "layers.1.up.weight", "gate_up", "x-up"]
KEYS = [
    *NAMES,
    *map(re.escape, NAMES),
    *(f"^{name}" for name in NAMES),
    *(f"^{re.escape(name)}" for name in NAMES),
    r"layers\.1\.up(\.weight)?",
    "layers.1.up.weight",
    "up|gate",
    r".*layers\.\d+\.up",
    "layers.1.0.up",
    "p",
    "",
    "(?:layers|blocks).1.up",
    ".",
]


@given(st.lists(st.sampled_from(KEYS), max_size=6), st.sampled_from(NAMES))
def test_the_first_key_that_matches_wins(keys: list[str], name: str) -> None:
    patterns = {key: number for number, key in enumerate(keys)}
    assert PatternTable(patterns).value(name, "default") == tried_in_turn(name, patterns)


ANY_KEY = st.text(alphabet="^ab.\\1", max_size=6)


@given(st.lists(ANY_KEY, max_size=4), st.text(alphabet="ab.1", min_size=1, max_size=8))
def test_any_keys_mean_what_they_mean_to_peft(keys: list[str], name: str) -> None:
    patterns = {key: number for number, key in enumerate(keys)}
    try:
        expected = tried_in_turn(name, patterns)
        for key in patterns:
            re.compile(rf"(.*\.)?({key})$")
    except re.error:
        return
    assert PatternTable(patterns).value(name, "default") == expected


def test_a_key_that_is_no_expression_is_an_error() -> None:
    with pytest.raises(re.error):
        PatternTable({"(": 1})


def test_lists_name_wholes_and_endings() -> None:
    entries = {"up", "layers.1.down"}
    assert is_listed("layers.0.up", entries)
    assert is_listed("a.layers.1.down", entries)
    assert not is_listed("layers.0.gate_up", entries)
    assert not is_listed("layers.11.down", entries)


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({"target_modules": ["up", "down"]}, {"layers.0.up", "layers.1.up"}),
        ({"target_modules": r"layers\.0\..*"}, {"layers.0.up", "layers.0.norm"}),
        ({"target_modules": ["up"], "exclude_modules": ["layers.0.up"]}, {"layers.1.up"}),
        ({"target_modules": ["up"], "exclude_modules": r".*\.1\.up"}, {"layers.0.up"}),
        ({"target_modules": ["up"], "modules_to_save": ["layers.1"]}, {"layers.0.up"}),
        ({"target_modules": ["up"], "modules_to_save": ["0"]}, {"layers.1.up"}),
        ({"target_modules": ["up"], "modules_to_save": ["0.u", "1.up"]}, {"layers.0.up"}),
        ({"target_modules": ["up"], "modules_to_save": ["yers.0.up"]}, {"layers.1.up"}),
        # As in PEFT, the number needs two names before it, or a pattern.
        ({"target_modules": ["up"], "layers_to_transform": [0]}, set()),
        ({"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "layers"}, {"layers.0.up"}),
        ({"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]}, {"layers.1.up"}),
        ({"target_modules": ["layers.1.up"], "layers_to_transform": [0]}, {"layers.1.up"}),
        ({"target_modules": "all-linear"}, set()),
        ({"target_modules": None}, set()),
        ({"target_modules": []}, set()),
    ],
)
def test_what_the_settings_surely_mean(settings: dict[str, Any], meant: set[str]) -> None:
    targeted = TargetedNames(settings)
    assert {name for name in ("layers.0.up", "layers.1.up", "layers.0.norm") if name in targeted} == meant
