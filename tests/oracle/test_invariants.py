"""Exact facts of the LoRA parametrisation, against closed forms and counted operations.

Shared notation: scale = alpha / r, W' = W + scale * B A, A (r, in) random, B (out, r) zero. The laws of
merging, fresh adapters and tied heads are in `tests/lora`.

Schulman et al., *LoRA Without Regret*, 2025, https://thinkingmachines.ai/blog/lora/
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, count_parameters, inject_lora, lora_layers

RATE, DECAY, EPS, BETAS = 3e-3, 0.1, 1e-3, (0.9, 0.95)


def outputs_while_training(p: float, q: float, scale_eps: bool, scale_decay: bool, steps: int = 25) -> Tensor:
    """Outputs of a two-layer net after each AdamW step, under alpha/(pq), p A, p LR_A, q LR_B."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    inject_lora(net, LoRAConfig(rank=3, alpha=8.0 / (p * q)))
    layers = lora_layers(net).values()
    for layer in layers:
        layer.lora_A.data *= p
    groups = [
        {
            "params": [getattr(layer, factor) for layer in layers],
            "lr": RATE * size,
            "eps": EPS / (size if scale_eps else 1),
            "weight_decay": DECAY / (size if scale_decay else 1),
        }
        for factor, size in (("lora_A", p), ("lora_B", q))
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, 16, 6, generator=generator, dtype=torch.float64)
    target = torch.randn(steps, 16, 5, generator=generator, dtype=torch.float64)
    outputs = []
    for step in range(steps):
        optimizer.zero_grad()
        (net(x[step]) - target[step]).square().mean().backward()
        optimizer.step()
        outputs.append(net(x[0]).detach())
    return torch.stack(outputs)


@pytest.mark.parametrize(("p", "q"), [(2.0, 1.0), (1.0, 4.0), (4.0, 0.5), (3.0, 7.0)])
def test_two_of_the_four_hyperparameters_are_redundant(p: float, q: float) -> None:
    plain = outputs_while_training(1, 1, True, True)
    assert (plain[-1] - plain[0]).abs().max() > 0.01
    changed = outputs_while_training(p, q, True, True)
    assert (changed - plain).abs().max() < 1e-10


@pytest.mark.parametrize(("scale_eps", "scale_decay"), [(False, True), (True, False)])
def test_eps_and_decay_must_be_scaled_too(scale_eps: bool, scale_decay: bool) -> None:
    plain = outputs_while_training(1, 1, True, True)
    assert (outputs_while_training(4, 2, scale_eps, scale_decay) - plain).abs().max() > 1e-5


NUM_INITS = 200


@functools.cache
def mean_first_update(rank: int, scaling: str) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the update after one Adam step with eps 0, over 200 initialisations of A.

    B starts at zero, so A gets no gradient and B moves by -lr * sign(G A^T), where G is the gradient of W.
    """
    width = 64
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, width, generator=generator, dtype=torch.float64)
    target = torch.randn(16, width, generator=generator, dtype=torch.float64)
    # Seeds differ between ranks: the estimates must be independent.
    torch.manual_seed(rank + (1000 if scaling == "rslora" else 0))
    layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(NUM_INITS)).double()
    for layer in layers:
        layer.weight.data.zero_()  # pyright: ignore
    inject_lora(layers, LoRAConfig(rank=rank, alpha=32, scaling=scaling))
    adapted = lora_layers(layers).values()
    # A has no gradient yet, and Adam with eps 0 would divide zero by zero.
    optimizer = torch.optim.Adam([layer.lora_B for layer in adapted], lr=1e-3, eps=0)
    sum((layer(x) - target).square().mean() for layer in layers).backward()  # pyright: ignore
    assert not any(layer.lora_A.grad.any() for layer in adapted)  # pyright: ignore
    optimizer.step()
    stacked = torch.stack([layer.weight_delta() for layer in adapted])
    return stacked.mean(0), stacked.std(0) / math.sqrt(NUM_INITS)


def relative_size(found: Tensor, expected: Tensor) -> float:
    return ((found * expected).sum() / expected.square().sum()).item()


def test_the_mean_first_update_does_not_depend_on_the_rank() -> None:
    expected, error = mean_first_update(64, "standard")
    assert (expected / error).square().mean() > 10
    for rank in (1, 4, 16):
        found, its_error = mean_first_update(rank, "standard")
        z = (found - expected) / (error**2 + its_error**2).sqrt()
        # 4,096 differences in units of their standard error: mean square 1, and none beyond 6.
        assert z.square().mean().item() == pytest.approx(1, abs=0.3), rank
        assert z.abs().max() < 6
        assert relative_size(found, expected) == pytest.approx(1, abs=0.15), rank


def test_under_rslora_the_first_update_grows_with_the_root_of_the_rank() -> None:
    expected, _ = mean_first_update(64, "standard")
    for rank in (4, 16, 64):
        found, _ = mean_first_update(rank, "rslora")
        assert relative_size(found, expected) == pytest.approx(math.sqrt(rank), rel=0.15), rank


@pytest.mark.parametrize(
    ("targets", "head", "per_layer", "total"),
    [
        ("mlp", False, 1_769_472, 1_769_472),
        ("attention", False, 851_968, 851_968),
        ("all", False, 2_621_440, 2_621_440),
        ("all", True, 2_753_792, 2_753_792),
    ],
)
def test_llama_8b_has_the_published_parameters_per_unit_of_rank(
    targets: str, head: bool, per_layer: int, total: int
) -> None:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    inject_lora(model, LoRAConfig(rank=8, targets=targets, adapt_head=head))
    count = count_parameters(model)
    assert count.adapter == count.trainable == 8 * total
    assert count.by_role.get("head", 0) == (8 * 132_352 if head else 0)
    if targets == "all":
        assert count.by_role["mlp"] == 8 * 1_769_472
        assert count.by_role["attention"] == 8 * 851_968


@pytest.mark.parametrize("rank", [1, 4, 32])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 64), (128, 32), (48, 200)])
def test_a_step_costs_two_thirds_of_a_full_one_plus_the_factors(rank: int, num_in: int, num_out: int) -> None:
    tokens = 16

    def flops(layer: nn.Module) -> int:
        x = torch.randn(tokens, num_in, requires_grad=True)
        # torch counts products that are added to another tensor, but not those that are added in place.
        in_place = {torch.ops.aten.addmm_: lambda added, a, b, **_: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            layer(x).sum().backward()
        return counter.get_total_flops()

    full = nn.Linear(num_in, num_out)
    lora = nn.Linear(num_in, num_out)
    inject_lora(lora, LoRAConfig(rank=rank))
    # Two operations per multiply-add, for every token.
    assert flops(full) == 2 * tokens * 3 * num_in * num_out
    assert flops(lora) == 2 * tokens * (2 * num_in * num_out + 3 * rank * (num_in + num_out))
    ratio = (2 * num_in * num_out + 3 * rank * (num_in + num_out)) / (3 * num_in * num_out)
    assert flops(lora) / flops(full) == pytest.approx(ratio, rel=1e-12)
