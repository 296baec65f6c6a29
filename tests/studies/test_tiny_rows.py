"""The rows of the small studies have the answers that they are said to have."""

from __future__ import annotations

import math

import pytest
import torch

from studies.modules.rows import KEY, OLD_FACTS, SYMBOLS, TASKS, VALUE, VOCAB, rows_of, text_entropy


def keys(ids: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in ids[:, 1 : 1 + KEY].tolist()}


def test_facts_have_distinct_keys_and_new_ones_share_none_with_old_ones() -> None:
    old, new = (rows_of("facts", version, OLD_FACTS)["input_ids"] for version in ("old", "new"))
    assert len(keys(old) | keys(new)) == 2 * OLD_FACTS


def test_a_fact_does_not_depend_on_how_many_are_asked_for_or_on_the_seed() -> None:
    few, many = rows_of("facts", "new", 10), rows_of("facts", "new", 500, seed=3)
    assert torch.equal(few["input_ids"], many["input_ids"][:10])


def test_values_of_facts_are_uniform() -> None:
    values = rows_of("facts", "new", 5000)["input_ids"][:, -VALUE:].flatten()
    counts = torch.bincount(values, minlength=SYMBOLS).double()
    expected = len(values) / SYMBOLS
    # Chi-squared with 63 degrees of freedom: mean 63, standard deviation 11.
    assert float(((counts - expected) ** 2 / expected).sum()) == pytest.approx(SYMBOLS - 1, abs=45)


def test_a_text_costs_the_entropy_of_its_chain_and_other_rows_are_drawn_by_another_seed() -> None:
    ids = rows_of("text", "new", 4000, seed=1)["input_ids"][:, 1:]
    counts = torch.zeros(SYMBOLS, SYMBOLS).double()
    counts.index_put_((ids[:, :-1].flatten(), ids[:, 1:].flatten()), torch.ones(ids[:, 1:].numel()).double(), True)
    seen = counts / counts.sum(1, keepdim=True)
    conditional = float((counts.sum(1) / counts.sum() * torch.special.entr(seen).sum(1)).sum())
    # The plug-in estimate is too low by about cells / (2 draws).
    assert conditional + SYMBOLS**2 / (2 * ids[:, 1:].numel()) == pytest.approx(text_entropy("new"), abs=0.02)
    assert not torch.equal(ids, rows_of("text", "new", 4000, seed=2)["input_ids"][:, 1:])
    assert text_entropy("new") < math.log(SYMBOLS)


def test_what_is_copied_comes_again_in_the_reverse_order() -> None:
    rows = rows_of("copy", "new", 5)
    first, second = rows["input_ids"][:, 1:].tensor_split([6], dim=1)
    assert torch.equal(second[:, 1:], first.flip(1))
    assert torch.equal(rows_of("copy", "old", 5)["input_ids"][:, 8:], rows_of("copy", "old", 5)["input_ids"][:, 1:7])


@pytest.mark.parametrize("task", TASKS)
def test_only_answers_are_supervised(task: str) -> None:
    rows = rows_of(task, "new", 3)  # pyright: ignore[reportArgumentType]
    assert int(rows["input_ids"].max()) < VOCAB
    supervised = (rows["labels"] != -100).sum(1).tolist()
    assert supervised == [{"facts": VALUE, "text": 14, "copy": 6}[task]] * 3
    assert torch.equal(rows["labels"][rows["labels"] != -100], rows["input_ids"][rows["labels"] != -100])
