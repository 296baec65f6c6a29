"""A higher rank computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_lora.errors import ConfigError, TargetNotFoundError
from lightning_lora.lora.adapter import inject_lora, lora_state_dict
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.grown_state import check_can_grow, extend_state
from lightning_lora.lora.growth import grow_adapters
from lightning_lora.lora.layers.adapted import adapted_weights
from tests.support import moe_models, tiny_models

CASES: dict[str, tuple[Callable[[], Any], LoRAConfig]] = {
    "linear": (tiny_models.llama, LoRAConfig(rank=2)),
    "rslora": (tiny_models.llama, LoRAConfig(rank=2, scaling="rslora")),
    "embedding and head": (tiny_models.llama, LoRAConfig(rank=2, adapt_embeddings=True, adapt_head=True)),
    "shared": (
        lambda: tiny_models.llama(tie_word_embeddings=True),
        LoRAConfig(rank=2, adapt_embeddings=True, adapt_head=True, tied_weights="both"),
    ),
    "transposed": (tiny_models.gpt2, LoRAConfig(rank=2)),
    "experts": (moe_models.BUILDERS["qwen3_moe"], LoRAConfig(rank=4)),
    "experts that share factors": (moe_models.BUILDERS["qwen3_moe"], LoRAConfig(rank=4, share_expert_factors=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_higher_rank_computes_the_same_and_learns_in_its_new_part(case: str) -> None:
    build, config = CASES[case]
    model = build().double()
    inject_lora(model, config)
    tiny_models.wake(model)
    before, parameters = tiny_models.logits(model), dict(model.named_parameters())
    scales = {name: layer.lora_specs[weight].scale for name, (layer, weight) in adapted_weights(model).items()}
    old = {name: layer.lora_specs[weight].rank for name, (layer, weight) in adapted_weights(model).items()}
    grow_adapters(model, {name: 2 * rank for name, rank in old.items()})
    assert torch.allclose(tiny_models.logits(model), before, rtol=0, atol=1e-12)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    tiny_models.loss(model).backward()
    for name, (layer, weight) in adapted_weights(model).items():
        spec, (A, B) = layer.lora_specs[weight], layer.lora_pair(weight)
        assert spec.rank == 2 * old[name] == A.shape[-2] == B.shape[-1]
        assert spec.scale == pytest.approx(scales[name])
        new = A.narrow(-2, old[name], old[name]), B.narrow(-1, old[name], old[name])
        zero, random = sorted(new, key=lambda part: float(part.detach().abs().max()))
        assert not zero.any()
        assert random.any()
        gradients = [p.grad for p in (A, B) if p.grad is not None]
        assert len(gradients) == 2, "both factors must learn"


def test_only_the_named_weights_grow() -> None:
    model = tiny_models.llama()
    inject_lora(model, LoRAConfig(rank=2))
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    first, *others = adapted_weights(model)
    grow_adapters(model, {first: 3})
    after = lora_state_dict(model)
    assert after[f"{first}.lora_A"].shape[0] == 3
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith(f"{first}."))
    weights = adapted_weights(model)
    assert all(weights[name][0].lora_specs[weights[name][1]].rank == 2 for name in others)


@pytest.mark.parametrize(
    ("ranks", "error", "text"),
    [
        ({"nowhere": 4}, TargetNotFoundError, "is no adapted weight"),
        ({"model.layers.0.self_attn.q_proj": 1}, ConfigError, "can be raised from 2 to"),
        ({"model.layers.0.self_attn.q_proj": 10_000}, ConfigError, "got 10000"),
    ],
)
def test_a_rank_that_cannot_be_is_refused_and_changes_nothing(
    ranks: dict[str, int], error: type[Exception], text: str
) -> None:
    model = tiny_models.llama()
    inject_lora(model, LoRAConfig(rank=2))
    before = tiny_models.state_bytes(model)
    with pytest.raises(error, match=text):
        grow_adapters(model, {"model.layers.1.mlp.up_proj": 4, **ranks})
    assert tiny_models.state_bytes(model) == before


def test_a_part_that_grows_late_in_a_run_moves_no_faster_than_the_rate() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 8))
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        weight.grad = torch.randn(2, 8, generator=generator)
        optimizer.step()
    shape, old = weight.shape, weight.detach().clone()
    weight.data, weight.grad = torch.cat([old, torch.zeros(2, 8)]), None
    extend_state(optimizer, {weight: shape})
    for _ in range(10):
        before = weight.detach().clone()
        weight.grad = torch.ones(4, 8)
        optimizer.step()
        # With zeros for the squares the tenth step is six rates long.
        assert 0 < float((weight.detach() - before)[2:].abs().max()) <= 0.0115


class Quantised(torch.Tensor):
    """A state that holds its numbers in another way, as that of torchao's optimizers."""


def test_a_state_that_is_no_plain_tensor_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 8))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"exp_avg": torch.zeros(2, 8).as_subclass(Quantised)}
    with pytest.raises(ConfigError, match=r"its state 'exp_avg' of a \(2, 8\) parameter is Quantised"):
        check_can_grow(optimizer, [weight])


def test_sizes_of_other_libraries_start_at_their_mean() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 8))
    optimizer, old = torch.optim.SGD([weight], lr=0.1), torch.randn(2, 8)
    # As bitsandbytes calls the averages of gradients and of their squares.
    optimizer.state[weight] = {"state1": old, "state2": old.square()}
    extend_state(optimizer, {weight: old.shape})
    state = optimizer.state[weight]
    assert not state["state1"][2:].any()
    torch.testing.assert_close(state["state2"][2:], old.square().mean().expand(2, 8))
