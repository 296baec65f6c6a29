"""Losses of rows of scores, and their gradients in place of the scores, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.lora.functional.kernels import cross_entropy as kernels
from tests.lora.functional.kernels.under_interpreter.memory import Memory
from tests.lora.functional.kernels.under_interpreter.near import TYPES, assert_rounded_once

IGNORED = -100
# Rows and classes; blocks have 16 columns here.
SHAPES = {"one row": (1, 5), "one class": (3, 1), "a block": (2, 16), "past three blocks": (5, 53)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK", 16)


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores far apart, and labels with some ignored; the first one is in the first column, the second in the last."""
    rows, classes = shape
    labels = torch.randint(classes, (rows,))
    labels[::3] = 0
    labels[1::3] = classes - 1
    return (torch.randn(shape) * 8).to(dtype), labels.where(torch.arange(rows) != 2, IGNORED)


def check(
    kernels: Any, memory: Memory, scores: Tensor, labels: Tensor, factors: Tensor | None, gradient: bool = True
) -> None:
    """Losses and gradients of a module of kernels for these tensors."""
    exact = scores.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="none")
    losses = losses if factors is None else losses * factors.double()
    (wanted,) = torch.autograd.grad(losses.sum(), exact)
    given = scores.clone(memory_format=torch.preserve_format)
    memory.allow(given, labels, factors)
    found = kernels.cross_entropy_(given, labels, factors, gradient, IGNORED)
    assert found.dtype is torch.float32
    assert_rounded_once(found, losses.detach())
    if gradient:
        assert_rounded_once(given, wanted)
    else:
        assert torch.equal(given, scores)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_losses_and_gradients_are_those_of_float64(
    shape: tuple[int, int], dtype: torch.dtype, weighted: bool, memory: Memory
) -> None:
    scores, labels = inputs(shape, dtype)
    factors = torch.rand(shape[0]) + 0.5 if weighted else None
    for gradient in (True, False):
        check(kernels, memory, scores, labels, factors, gradient)


def test_inputs_of_any_layout_are_read(memory: Memory) -> None:
    check_layouts(kernels, memory)


def check_layouts(kernels: Any, memory: Memory) -> None:
    """Scores far below zero whose rows lie side by side; labels and factors that lie apart."""
    scores, labels = inputs((5, 53), torch.float32)
    transposed = (scores - 30).T.contiguous().T
    spread_labels, factors = labels.repeat_interleave(2)[::2], torch.rand(10)[::2]
    check(kernels, memory, transposed, spread_labels, factors)


def test_classes_without_a_chance_come_first(memory: Memory) -> None:
    check_hopeless(kernels, memory)


def check_hopeless(kernels: Any, memory: Memory) -> None:
    """Scores of minus infinity fill the first block: nothing has been seen when the second one begins."""
    scores, labels = inputs((4, 40), torch.bfloat16)
    scores[:, :20] = -torch.inf
    check(kernels, memory, scores, labels.clamp(min=25), None)


def test_a_row_of_nan_is_seen_and_an_ignored_one_is_not() -> None:
    scores = torch.zeros(2, 20)
    scores[:, 5] = torch.nan
    losses = kernels.cross_entropy_(scores, torch.tensor([3, IGNORED]), None, True, IGNORED)
    assert losses.isnan().tolist() == [True, False]
    assert scores.isnan().all(1).tolist() == [True, False]
    assert not scores[1].any()
