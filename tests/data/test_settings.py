"""Settings of data out of range, or of another type: one error that names the setting and the value."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lightning_lora.data import SFTDataModule
from lightning_lora.errors import ConfigError

OPTIONS = {
    "batch_size": [0, -1, 1.5, True, "8", None],
    "max_length": [0, -1, 2.0, None],
    "num_workers": [-1, None, 0.5],
    "seed": [-1, None, "a"],
    "max_rows": [0, -5, 1.5, True],
    "validation_rows": [0, "all"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_numbers_out_of_range_are_refused(name: str, value: Any) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(
        ConfigError, match=rf"{name} must be a whole number of [01] or more, got {re.escape(repr(value))}"
    ):
        SFTDataModule("a.jsonl", **options)


SETTINGS = {
    "columns": (["question"], "columns must map a file's own names"),
    "prompt_separator": (None, "prompt_separator must be a text, got None"),
    "streaming": ("no", "streaming must be true or false, got 'no'"),
    "beyond_context": ("no", "beyond_context must be true or false, got 'no'"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_another_type_are_refused(name: str) -> None:
    value, message = SETTINGS[name]
    options: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=message):
        SFTDataModule("a.jsonl", **options)
