"""Capacity tables, verdicts and sentences, on planted data."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import ConfigError, LoRAConfig, TargetNotFoundError
from lightning_lora.data import SFTDataModule
from lightning_lora.planning.adapter_sizes import adapter_sizes
from lightning_lora.planning.base_bits import BaseBits
from lightning_lora.planning.capacity import (
    CapacityRow,
    capacity_row,
    capacity_table,
    highest_rank,
    needed_rank,
)
from lightning_lora.planning.capacity_sentence import capacity_sentence
from lightning_lora.planning.count_data import count_data
from lightning_lora.planning.data_counts import DataCounts, without_counts
from tests.data.conftest import Write
from tests.support import toys
from tests.support.moe_models import moe
from tests.support.tiny_models import llama, mlp

RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def tokens(number: int, **others: Any) -> DataCounts:
    settings = {"rows": 1000, "duplicate_rows": 0, "truncated_rows": 0, "unsupervised_rows": 0, **others}
    return DataCounts(
        "tokens", supervised_tokens=number, unique_supervised_tokens=number, bits=float(number), **settings
    )


def verdicts(rows: list[CapacityRow]) -> list[str]:
    return [row.verdict for row in rows if row.targets == rows[0].targets]


@pytest.mark.parametrize(
    ("number", "verdict"),
    [(0, "inside"), (100, "inside"), (101, "tight"), (200, "tight"), (201, "over"), (10**6, "over")],
)
def test_the_verdict_has_the_bounds_of_the_ratios(number: int, verdict: str) -> None:
    row = capacity_row("all", 1, 100, tokens(number))
    assert (row.ratio_a, row.ratio_b, row.verdict) == (number / 100, number / 200, verdict)


@pytest.mark.parametrize(
    ("bits", "verdict"), [(50.0, "inside"), (100.0, "inside"), (101.0, "tight"), (200.0, "tight"), (201.0, "over")]
)
def test_measured_bits_take_the_place_of_the_counted_ones(bits: float, verdict: str) -> None:
    row = capacity_row("all", 1, 100, tokens(10), BaseBits(bits, bits, bits, 5, 10))
    assert (row.ratio_a, row.ratio_b, row.verdict) == (0.1, bits / 200, verdict)
    # Few bits do not make up for more tokens than parameters.
    assert capacity_row("all", 1, 100, tokens(150), BaseBits(1.0, 1.0, 1.0, 5, 10)).verdict == "tight"


def test_the_table_has_every_rank_for_every_target_set_that_there_is() -> None:
    rows = capacity_table(llama(), tokens(1))
    assert [row.rank for row in rows] == RANKS * 3
    assert list(dict.fromkeys(row.targets for row in rows)) == ["all", "attention", "mlp"]
    mixture = capacity_table(moe("qwen3_moe"), tokens(1), config=LoRAConfig(targets="experts"))
    assert list(dict.fromkeys(row.targets for row in mixture)) == ["experts", "all", "attention"]
    plain = capacity_table(mlp(), tokens(1), config=LoRAConfig(targets=["first", "second"], rank=24))
    assert list(dict.fromkeys(row.targets for row in plain)) == ["first, second", "all"]
    assert [row.rank for row in plain[:11]] == sorted([*RANKS, 24])
    with pytest.raises(TargetNotFoundError, match="frist"):
        capacity_table(mlp(), tokens(1), config=LoRAConfig(targets=["frist"]))


def test_a_rank_beyond_a_layer_counts_as_its_full_rank() -> None:
    rows = {row.rank: row.parameters for row in capacity_table(mlp(), tokens(1))}
    # (32, 16) and (8, 32).
    assert rows[8] == 8 * (48 + 40)
    assert rows[16] == 16 * 48 + 8 * 40 == rows[512]


def test_settings_of_the_run_hold_in_all_target_sets() -> None:
    rates = {"down_proj": 2.0}
    config = LoRAConfig(
        adapt_head=True, trainable=["*.norm"], rank_pattern={"down_proj": 1}, lr_multiplier_pattern=rates
    )
    own = {(row.targets, row.rank): row.parameters for row in capacity_table(llama(), tokens(1), config=config)}
    head_and_norm = (32 + 64) * 4 + 32
    assert own["mlp", 4] == 2 * 3 * 80 * 4 + head_and_norm
    assert {targets for targets, _ in own} == {"all", "attention", "mlp"}
    # The rank of one layer was chosen for the targets of the run.
    assert own["all", 4] == 2 * (2 * 80 * 4 + 80) + 2 * (2 * 64 + 2 * 48) * 4 + head_and_norm


def test_the_needed_rank_is_the_lowest_one_inside_for_the_own_targets() -> None:
    per_rank = adapter_sizes(llama(), LoRAConfig(targets="attention")).parameters(1)
    rows = capacity_table(llama(), tokens(3 * per_rank), config=LoRAConfig(targets="attention"))
    assert verdicts(rows)[:4] == ["over", "tight", "inside", "inside"]
    assert needed_rank(rows) == 4
    assert needed_rank(capacity_table(llama(), tokens(10**9))) is None
    assert needed_rank(capacity_table(llama(), without_counts("unknown", 10))) is None


def test_the_highest_rank_is_a_quarter_of_the_narrowest_layer_and_at_most_512() -> None:
    def highest(*shapes: tuple[int, int]) -> int:
        with torch.device("meta"):
            return highest_rank(adapter_sizes(nn.Sequential(*(nn.Linear(*shape) for shape in shapes)), LoRAConfig()))

    assert highest((4096, 4096), (4096, 1024)) == 256
    assert highest((8192, 4000)) == 512
    assert highest((100, 400)) == 16
    assert highest((2, 3)) == 1


@pytest.mark.slow
def test_a_model_of_70_billion_parameters_is_counted_in_seconds() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "vocab_size": 128256,
    }
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=64, num_key_value_heads=8))
    start = time.process_time()
    capacity_table(model, tokens(1), config=LoRAConfig(adapt_head=True))
    assert time.process_time() - start < 10


# Planted data.


def chats(answers: list[str], number: int = 10**9) -> list[dict[str, str]]:
    return [{"question": f"{i % number}?", "answer": answer} for i, answer in enumerate(answers)]


def sentence(counts: DataCounts, rank: int = 32, module: nn.Module | None = None, **bits: Any) -> tuple[str, str]:
    """The verdict at a rank, and the sentence."""
    rows = capacity_table(llama() if module is None else module, counts, config=LoRAConfig(rank=rank), **bits)
    (row,) = [row for row in rows if row.rank == rank and row.targets == "all"]
    text = capacity_sentence(rows, counts, rank, **bits)
    assert "you need" not in text
    assert text.count(". ") <= 1
    return row.verdict, text


def test_ten_rows_fit_at_any_rank(tokenizer: Any, write: Write) -> None:
    counts = count_data(SFTDataModule(write("ten.jsonl", chats(["one two three"] * 10)), tokenizer=tokenizer))
    verdict, text = sentence(counts)
    assert (counts.rows, verdict) == (10, "inside")
    assert re.fullmatch(
        r"\d+ trained tokens in unique rows, at an assumed bit for each, fit into the [\d,]+ trained "
        r"parameters of rank 32 \(all\)\. The bound would be kept at rank 1 already\.",
        text,
    )


def test_a_million_tokens_are_more_than_rank_1_can_surely_hold() -> None:
    verdict, text = sentence(tokens(10**6), rank=1)
    assert verdict == "over"
    assert text == (
        "1,000,000 trained tokens in unique rows, at an assumed bit for each, are more than the 928 "
        "trained parameters of rank 1 (all) can surely hold: learning may become slower than in full fine-tuning, "
        "though it does not stop. No rank up to 512 keeps the bound; whether more rank helps can only be measured "
        "(RankProbe)."
    )
    with torch.device("meta"):
        large = LlamaForCausalLM(LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=8))
    verdict, text = sentence(tokens(10**6), rank=1, module=large)
    assert verdict == "over"
    assert text.endswith("Rank 16 keeps the bound.")
    assert sentence(tokens(10**6), rank=8, module=large)[0] == "tight"
    assert "would nearly fill" in sentence(tokens(10**6), rank=8, module=large)[1]


def test_copies_of_one_row_are_one_row(tokenizer: Any, write: Write) -> None:
    path = write("same.jsonl", chats(["the answer is five."] * 5000, number=1))
    counts = count_data(SFTDataModule(path, tokenizer=tokenizer))
    assert counts.supervised_tokens == 5000 * (counts.unique_supervised_tokens or 0)
    assert counts.remarks() == ["All 5,000 rows are the same row, which counts once."]
    verdict, text = sentence(counts, rank=1)
    assert verdict == "inside"
    assert text.startswith(f"{counts.unique_supervised_tokens} trained tokens in unique rows")


@pytest.mark.filterwarnings("ignore:train. .* rows longer than max_length")
def test_cut_completions_count_what_is_left_and_are_told(tokenizer: Any, write: Write) -> None:
    path = write("long.jsonl", chats(["the answer is five. " * 200] * 20))
    counts = count_data(SFTDataModule(path, tokenizer=tokenizer, max_length=128))
    assert counts.longest_row == 128
    assert (counts.supervised_tokens or 0) < 20 * 128
    assert counts.remarks() == ["20 rows are cut at max_length and lose what comes after it."]


def test_regression_cannot_be_told() -> None:
    counts = count_data(toys.loader())
    verdict, text = sentence(counts, module=mlp())
    assert verdict == "cannot tell"
    assert text.startswith("Nothing is known of the information in these targets")


def test_labels_are_told_with_their_bits() -> None:
    counts = count_data(DataLoader(TensorDataset(torch.randn(64, 16), torch.arange(64) % 4)))
    verdict, text = sentence(counts, rank=2, module=mlp())
    assert verdict == "inside"
    assert text.startswith("64 labels in unique rows (128 bits, an upper bound")
    _, text = sentence(tokens(100), rank=2, base_bits=BaseBits(1234.0, 1200.0, 1300.0, 5, 10))
    assert text.startswith("100 trained tokens in unique rows (1,234 bits for the base, an upper bound")
    with pytest.raises(ConfigError, match="the table has no rank 3"):
        capacity_sentence(capacity_table(mlp(), counts), counts, 3)


def test_rows_and_counts_are_plain_types() -> None:
    from dataclasses import asdict

    counts = count_data(DataLoader(TensorDataset(torch.randn(64, 16), torch.arange(64) % 4)))
    rows = capacity_table(mlp(), counts)
    assert json.loads(json.dumps([asdict(counts), *map(asdict, rows)]))
