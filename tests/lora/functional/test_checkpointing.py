"""Activation checkpointing computes blocks again in the backward pass, with the same values, masks and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.lora.layers.adapted import factor_parameters
from tests.support.moe_models import moe
from tests.support.tiny_models import llama, wake

WIDTH = 12

both_kinds = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])


class Attention(nn.Module):
    """Three layers with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).tanh() * self.k(x) + self.v(x).sigmoid()


class Gated(nn.Module):
    """A gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """The fused experts of a Mixtral, with a fixed routing."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = moe("mixtral", hidden_size=WIDTH, num_attention_heads=2).get_submodule(
            "model.layers.0.mlp.experts"
        )

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(2 * len(x)).view(-1, 2) * 3 % 4
        return self.experts(x, index, torch.full(index.shape, 0.5, dtype=x.dtype))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH)),
    "siblings": Attention,
    "gated": Gated,
    "experts": Experts,
}


def adapted(build: Callable[[], nn.Module], dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    block = build()
    inject_lora(block, LoRAConfig(rank=2, dropout=dropout))
    wake(block, size=0.3)
    return block.train()


def passes(block: nn.Module, rows: int, run: Callable[..., Any]) -> list[Tensor]:
    """Outputs and gradients of three training passes; siblings are computed together from the second one."""
    torch.manual_seed(1)
    found: list[Tensor] = []
    for _ in range(3):
        x = torch.randn(rows, WIDTH, dtype=torch.float64, requires_grad=True)
        y = run(block, x)
        y.square().sum().backward()
        assert x.grad is not None
        found += [y.detach(), x.grad]
    for factor in factor_parameters(block).values():
        assert factor.grad is not None
        found.append(factor.grad)
    return found


@both_kinds
@pytest.mark.parametrize("dropout", [0.0, 0.3])
# Many rows: the update is merged into the weight first (`merging_pays`).
@pytest.mark.parametrize("rows", [5, 100])
@pytest.mark.parametrize("name", BLOCKS)
def test_checkpointing_changes_no_value_and_no_gradient(name: str, rows: int, dropout: float, reentrant: bool) -> None:
    block = adapted(BLOCKS[name], dropout).double()
    plain = passes(copy.deepcopy(block), rows, lambda block, x: block(x))
    again = passes(block, rows, lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    for ours, theirs in zip(again, plain, strict=True):
        # Siblings add up in another order where gradients are off, as in the first run of reentrant checkpointing.
        torch.testing.assert_close(ours, theirs, rtol=1e-9 if reentrant else 0, atol=1e-9 if reentrant else 0)


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
@both_kinds
def test_a_model_on_many_tokens_trains_with_checkpointing(reentrant: bool) -> None:
    model: Any = llama()
    inject_lora(model, LoRAConfig(rank=2))
    wake(model)
    model.train()
    tokens = torch.arange(8 * 100).reshape(8, 100) * 7 % 64
    factors = list(factor_parameters(model).values())
    wanted = torch.autograd.grad(model(tokens, labels=tokens).loss, factors)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(tokens, labels=tokens).loss.backward()
    for factor, gradient in zip(factors, wanted, strict=True):
        torch.testing.assert_close(factor.grad, gradient)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", ["inside", "outside"])
def test_the_mask_of_the_second_run_is_that_of_the_first(first: str, dtype: torch.dtype, reentrant: bool) -> None:
    block: Any = adapted(lambda: Attention().to(dtype), dropout=0.5)
    x = torch.randn(40, WIDTH, dtype=dtype, requires_grad=True)
    if first == "outside":
        # The layer outside draws a mask for the same tensor.
        block.q(x)
    y: Any = checkpoint(block.k, x, use_reentrant=reentrant)
    block.v(x.detach())
    update = (y - F.linear(x, block.k.weight, block.k.bias)).detach().float()
    d_y = torch.randn_like(update)
    y.backward(d_y.to(dtype))
    # The update is linear in each factor, so its product with the gradient is the update itself.
    for factor in (block.k.lora_A, block.k.lora_B):
        torch.testing.assert_close((factor.grad * factor).sum(), (update * d_y).sum(), rtol=2e-2, atol=2e-2)


def test_a_gate_inside_a_checkpoint_is_computed_twice_and_no_more() -> None:
    runs = []

    def block(gate: Tensor, up: Tensor) -> Tensor:
        runs.append(gate)
        return F.silu(gate * 1) * up

    layer = adapted(lambda: nn.Linear(WIDTH, WIDTH))
    x: Any = checkpoint(block, *(torch.randn(4, WIDTH, requires_grad=True) for _ in range(2)), use_reentrant=False)
    layer(x).sum().backward()
    assert len(runs) == 2
