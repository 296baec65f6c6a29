"""Settings of data out of range, or of another type: one error that names the setting and the value."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from lightning_lora.data import PreferenceDataModule, PromptDataModule, SFTDataModule
from lightning_lora.errors import ConfigError
from tests.data.conftest import Write
from tests.support.tiny_tokenizer import tiny_tokenizer

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


UNUSED: list[tuple[Any, dict[str, Any], str]] = [
    (SFTDataModule, {"train": "a.jsonl", "validation_rows": 4}, "validation_rows=4 has no effect: no validation rows"),
    (
        PromptDataModule,
        {"train": "a.jsonl", "validation_rows": 4},
        "validation_rows=4 has no effect: no validation",
    ),
    (PreferenceDataModule, {"train": "a.jsonl", "validation_rows": 4}, "validation_rows=4 has no effect"),
    (SFTDataModule, {"test": "a.jsonl", "packing": True, "max_rows": 4}, "max_rows=4 and packing=True has no effect"),
]


@pytest.mark.parametrize(("kind", "settings", "told"), UNUSED)
def test_settings_of_a_split_without_rows_are_told(kind: Any, settings: dict[str, Any], told: str) -> None:
    with pytest.warns(UserWarning, match=told) as caught:
        kind(**settings)
    assert len(caught) == 1


@pytest.mark.parametrize("more", [{"validation": "b.jsonl"}, {"validation_share": 0.5}])
def test_rows_for_validation_may_be_few(more: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SFTDataModule("a.jsonl", validation_rows=4, **more)


PAIR = {"question": "five", "answer": "six"}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
IN_ROWS: dict[str, tuple[dict[str, Any], str | None, dict[str, Any], str]] = {
    "separator": (
        PAIR,
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        {"prompt_separator": " "},
        "prompt_separator is not used where",
    ),
    "end": (PAIR, None, {"end_of_answer": "<|end|>"}, "end_of_answer changes nothing in a row without a chat template"),
    "text": ({"text": "five"}, None, {"train_on": "last answer"}, "train_on changes nothing in a plain text"),
}


@pytest.mark.filterwarnings("ignore:.*does not learn to stop")
@pytest.mark.parametrize("name", IN_ROWS)
def test_settings_of_rows_of_another_kind_are_told(name: str, write: Write) -> None:
    row, template, settings, told = IN_ROWS[name]
    data = SFTDataModule(write("a.jsonl", [row] * 2), tokenizer=tiny_tokenizer(template), **settings)
    with pytest.warns(UserWarning, match=told):
        data.setup("fit")
