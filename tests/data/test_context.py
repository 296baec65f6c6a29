"""No row is longer than the context of the model, unless that is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from lightning_lora.errors import ConfigError
from lightning_lora.tasks import CausalLM
from lightning_lora.tasks.loading import context_length
from tests.data.conftest import Write
from tests.support import toys
from tests.support.tiny_tokenizer import tiny_tokenizer

pytestmark = toys.expected_warnings

ROWS = [{"text": "0" * length} for length in (5, 20, 40, 50)]
"""Tokens of the rows: one for each digit, and the end token."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_llama(tmp_path_factory.mktemp("models") / "llama", max_position_embeddings=32)


def fit(llama: Path, path: str, tmp_path: Path, **options: Any) -> SFTDataModule:
    data = SFTDataModule(path, batch_size=4, **options)
    toys.trainer(tmp_path).fit(CausalLM(str(llama)), datamodule=data)
    return data


def test_longer_rows_are_refused_with_both_numbers(write: Write, llama: Path, tmp_path: Path) -> None:
    message = (
        r"max_length=1024 is above the context of the model, 32 tokens, and 2 of 4 train rows are longer than that "
        r"\(the longest has 51\). Set max_length=32 to cut them, or beyond_context=true"
    )
    with pytest.raises(ConfigError, match=message):
        fit(llama, write("a.jsonl", ROWS), tmp_path)


def test_rows_that_are_cut_or_short_or_wanted_are_trained_on(write: Write, llama: Path, tmp_path: Path) -> None:
    path = write("a.jsonl", ROWS)
    assert fit(llama, write("b.jsonl", ROWS[:2]), tmp_path).statistics["train"].longest == 21
    with pytest.warns(UserWarning, match="train: 2 of 4 rows longer than max_length=32 tokens and cut"):
        fit(llama, path, tmp_path, max_length=32)
    assert fit(llama, path, tmp_path, beyond_context=True).statistics["train"].longest == 51
    with pytest.raises(ConfigError, match="2 of 4 validation rows are longer"):
        fit(llama, write("b.jsonl", ROWS[:2]), tmp_path, validation=path)


@pytest.mark.parametrize("packing", [True, "batch"])
def test_a_pack_may_be_longer_as_positions_begin_again(write: Write, llama: Path, tmp_path: Path, packing: Any) -> None:
    fit(llama, write("b.jsonl", ROWS[:2] * 4), tmp_path, packing=packing)


def test_without_a_model_the_tokenizer_knows(write: Write) -> None:
    path, tokenizer = write("a.jsonl", ROWS), tiny_tokenizer()
    tokenizer.model_max_length = 45
    with pytest.raises(
        ConfigError, match=r"context of the tokenizer \(model_max_length\), 45 tokens, and 1 of 4 train"
    ):
        SFTDataModule(path, tokenizer=tokenizer).setup()
    SFTDataModule(path, tokenizer=tokenizer, beyond_context=True).setup()


def test_a_tokenizer_that_does_not_know_sets_no_limit(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.model_max_length > 1e20
    SFTDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer).setup()


POSITIONS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "RoPE": ("llama", {"max_position_embeddings": 4096}, 4096),
    "learned": ("gpt2", {"n_positions": 512}, 512),
    "ALiBi": ("bloom", {}, None),
    "relative": ("t5", {}, None),
    "linear": ("llama", {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
    "yarn": (
        "qwen2",
        {
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    "yarn, whole length given": (
        "llama",
        {
            "max_position_embeddings": 16384,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        },
        16384,
    ),
    "llama3": (
        "llama",
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        131072,
    ),
    "by type of layer": ("gemma3_text", {"max_position_embeddings": 1000}, 1000),
    "images and text": ("gemma3", {"text_config": {"max_position_embeddings": 2000}}, 2000),
}  # fmt: skip


@pytest.mark.parametrize("case", POSITIONS)
def test_the_context_is_that_of_the_config(case: str) -> None:
    name, settings, length = POSITIONS[case]
    assert context_length(AutoConfig.for_model(name, **settings)) == length
