"""Under ``torch.use_deterministic_algorithms`` torch fills new memory; tensors that we write in full are spared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.lora.functional import AdaptedWeight
from lightning_lora.lora.functional.expert_rows import LoopedRows
from lightning_lora.lora.functional.fused_experts import fused_expert_linear
from lightning_lora.lora.functional.seeded_dropout import drop
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.tasks.head_loss import head_loss
from tests.lora.functional.test_checkpointing import Attention, Gated
from tests.support.tiny_models import wake

ROWS, WIDTH = 256, 12


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def filled(run: Callable[[], object]) -> int:
    """Entries that torch fills while ``run`` runs."""
    with profile(record_shapes=True) as profiler:
        run()
    fills = [event for event in profiler.events() or () if event.name == "aten::fill_"]
    return sum(math.prod(event.input_shapes[0]) for event in fills)


class Halves(Gated):
    """Gate and up in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 32)
        del self.up

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("build", [Attention, Gated, Halves])
def test_no_output_of_an_adapted_layer_is_filled_before_it_is_written(build: Any) -> None:
    block: nn.Module = build()
    inject_lora(block, LoRAConfig(rank=1))
    wake(block)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    needed = [x, *factor_parameters(block).values()]
    for _ in range(2):
        y = block.train()(x)
        torch.autograd.grad(y, needed, torch.ones_like(y))
    d_y = torch.ones(ROWS, WIDTH)
    assert filled(lambda: torch.autograd.grad(block(x), needed, d_y)) < ROWS * WIDTH


@pytest.mark.usefixtures("deterministic")
def test_no_output_of_adapted_experts_is_filled_before_it_is_written() -> None:
    x, d_y = torch.randn(ROWS, WIDTH, requires_grad=True), torch.ones(ROWS, 2 * WIDTH)
    A, B = torch.randn(2, 1, WIDTH, requires_grad=True), torch.randn(2, 2 * WIDTH, 1, requires_grad=True)
    adapted = AdaptedWeight(torch.randn(2, 2 * WIDTH, WIDTH), None, A, B, 1.0)
    rows = LoopedRows([ROWS // 4, 3 * ROWS // 4])
    assert filled(lambda: torch.autograd.grad(fused_expert_linear(x, adapted, rows), (x, A, B), d_y)) < ROWS


@pytest.mark.usefixtures("deterministic")
def test_the_mask_of_dropout_is_not_filled_before_it_is_written() -> None:
    x = torch.randn(ROWS, WIDTH)
    # Torch compares into memory of its own, one byte for each entry, which it fills.
    assert filled(lambda: drop(x, 0.5, 3)) < 1.1 * ROWS * WIDTH


@pytest.mark.usefixtures("deterministic")
def test_the_loss_at_the_head_fills_gradients_of_weights_only() -> None:
    hidden, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(50, WIDTH)
    labels = torch.arange(ROWS) % 50
    assert filled(lambda: head_loss(hidden, weight, labels).backward()) < ROWS * WIDTH


def test_fills_are_seen() -> None:
    assert filled(lambda: torch.empty(30, 40)) == 0
    torch.use_deterministic_algorithms(True)
    try:
        assert filled(lambda: torch.empty(30, 40)) == 1200
    finally:
        torch.use_deterministic_algorithms(False)
