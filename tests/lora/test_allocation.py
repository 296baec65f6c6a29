"""Ranks go where the gradient needs them, at no more parameters, and nothing of the module changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.lora.adapter import inject_lora
from lightning_lora.lora.allocation import allocate_ranks
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.growth_plan import num_factor_parameters
from lightning_lora.lora.layers.adapted import adapted_weights
from tests.support import moe_models, tiny_models

WIDTH = 96


class Two(nn.Module):
    """Two layers whose gradients have rank 2 and rank 12."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow, self.broad = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        few, many = batch
        return (self.drop(self.narrow(few)) ** 2).sum() + (self.broad(many) ** 2).sum()


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(1, WIDTH), torch.randn(6, WIDTH)) for _ in range(2)]


@pytest.mark.parametrize("rank", [4, 8])
def test_ranks_go_where_the_gradient_has_them(rank: int) -> None:
    module = Two()
    module.narrow.weight.grad = torch.ones(WIDTH, WIDTH)
    module.broad.requires_grad_(False)
    data = batches()
    before, state = tiny_models.state_bytes(module), torch.get_rng_state()
    config = LoRAConfig(rank=rank, targets=["narrow", "broad"])
    found = allocate_ranks(module, module, data, config)
    assert found.rank_pattern["narrow"] <= max(2, 2 * rank - 12)
    assert found.rank_pattern["narrow"] + found.rank_pattern["broad"] == 2 * rank
    assert tiny_models.state_bytes(module) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert module.drop.training
    assert (module.narrow.weight.requires_grad, module.broad.weight.requires_grad) == (True, False)
    assert torch.equal(module.narrow.weight.grad, torch.ones(WIDTH, WIDTH))
    assert module.broad.weight.grad is None
    inject_lora(
        module,
        LoRAConfig(
            rank=rank, targets=["narrow", "broad"], rank_pattern=found.rank_pattern, alpha_pattern=found.alpha_pattern
        ),
    )
    assert num_factor_parameters(module) == found.parameters <= 2 * rank * 2 * WIDTH
    for layer, weight in adapted_weights(module).values():
        assert layer.lora_specs[weight].scale == pytest.approx(config.scale(rank, 32))


def test_a_sketch_finds_the_shares_of_the_gradient_itself() -> None:
    module = Two()
    found = allocate_ranks(module, module, batches(), LoRAConfig(rank=4, targets=["narrow", "broad"]))
    module.eval()
    for batch in batches():
        module(batch).backward()
    for name, layer in (("narrow", module.narrow), ("broad", module.broad)):
        assert layer.weight.grad is not None
        squares = torch.linalg.svdvals(layer.weight.grad.double()).square()
        rank = found.rank_pattern[name]
        assert found.shares[name] == pytest.approx(float(squares[:rank].sum() / squares.sum()), rel=0.15)


def test_every_kind_of_layer_is_measured_or_told() -> None:
    model = moe_models.BUILDERS["qwen3_moe"]()
    tokens = tiny_models.TOKENS
    found = allocate_ranks(model, lambda batch: model(input_ids=batch, labels=batch).loss, [tokens], LoRAConfig(rank=4))
    assert any("self_attn" in name for name in found.rank_pattern)
    assert all("experts" in name for name in found.left_out)
    assert found.left_out
    uniform = moe_models.BUILDERS["qwen3_moe"]()
    inject_lora(uniform, LoRAConfig(rank=4))
    inject_lora(model, LoRAConfig(rank=4, rank_pattern=found.rank_pattern, alpha_pattern=found.alpha_pattern))
    assert num_factor_parameters(model) == found.parameters <= num_factor_parameters(uniform)
    image = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
    found = allocate_ranks(
        image, lambda x: image(x).square().sum(), [torch.randn(2, 3, 8, 8)], LoRAConfig(rank=2, targets=["0", "3"])
    )
    assert found.rank_pattern.keys() == {"0", "3"}


def test_what_cannot_be_measured_is_one_error() -> None:
    module, config = Two(), LoRAConfig(rank=2, targets=["narrow", "broad"])
    with pytest.raises(ConfigError, match="batches is empty"):
        allocate_ranks(module, module, [], config)
    with pytest.raises(ConfigError, match="the loss of batch 0 is nan"):
        allocate_ranks(module, lambda batch: module(batch) * float("nan"), batches(), config)
    assert module.narrow.weight.requires_grad
    with pytest.raises(ConfigError, match="weights without values"):
        allocate_ranks(module.to("meta"), module, [], config)
