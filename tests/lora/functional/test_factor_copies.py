"""Factors are cast once for a pass, and are never older than the factors themselves."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.launches import LaunchCounter
from lightning_lora import LoRAConfig, inject_lora, lora_layers
from lightning_lora.lora.functional import factor_copies
from tests.support.tiny_models import wake

WIDTH = 32
CASTS = ("_foreach_copy_", "_to_copy", "copy_")


def network() -> Any:
    """Linear layers in bfloat16 with factors in float32."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))).bfloat16()
    inject_lora(model, LoRAConfig(rank=16))
    wake(model)
    return model


def inputs() -> Tensor:
    return torch.randn(6, WIDTH).bfloat16()


def by_formula(model: nn.Module, x: Tensor) -> Tensor:
    """What the network computes, from its factors as they are now."""
    for layer in lora_layers(model).values():
        A, B = (factor.detach().bfloat16().float() for factor in layer.lora_pair())
        x = (x.float() @ layer.weight.float().T + layer.lora_spec.scale * (x.float() @ A.T @ B.T)).bfloat16()
    return x


def check(model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(model(x), by_formula(model, x), rtol=0.05, atol=0.05)


def forward_casts(model: nn.Module, x: Tensor) -> int:
    with LaunchCounter() as counter:
        model(x)
    return sum(counter.counts[name] for name in CASTS)


def test_one_cast_serves_all_layers_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_copies, "_passes", factor_copies._Passes())  # no model of another test leads
    model, x = network(), inputs()
    first, *others = (forward_casts(model, x) for _ in range(4))
    assert first == 4
    assert others == [1, 1, 1]


def add_to(factor: nn.Parameter) -> None:
    with torch.no_grad():
        factor.add_(1.0)


def add_past_autograd(factor: nn.Parameter) -> None:
    factor.data.add_(1.0)


def replace_memory(factor: nn.Parameter) -> None:
    factor.data = factor.data + 1.0


def step(factor: nn.Parameter) -> None:
    factor.grad = -torch.ones_like(factor)
    torch.optim.SGD([factor], lr=1.0).step()


CHANGES: list[Callable[[nn.Parameter], None]] = [add_to, add_past_autograd, replace_memory, step]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("index", range(4))
def test_a_changed_factor_counts_in_the_next_pass(change: Callable[[nn.Parameter], None], index: int) -> None:
    model, x = network(), inputs()
    for _ in range(3):
        model(x).sum().backward()
        change(model[index].lora_B)
        check(model, x)


@pytest.mark.parametrize("change", [add_to, replace_memory, step], ids=lambda change: change.__name__)
def test_a_factor_that_changes_within_a_pass_counts_at_once(change: Any) -> None:
    model, x = network(), inputs()
    for _ in range(3):
        model(x)
    hidden = model[:3](x)
    change(model[3].lora_B)
    torch.testing.assert_close(model[3](hidden), by_formula(model[3:], hidden), rtol=0.05, atol=0.05)


def test_a_layer_that_is_called_again_in_a_pass_sees_what_was_changed_past_autograd() -> None:
    model, x = network(), inputs()
    for _ in range(3):
        model(x)
    add_past_autograd(model[2].lora_B)
    torch.testing.assert_close(model[2](x), by_formula(model[2:3], x), rtol=0.05, atol=0.05)


def test_a_copy_that_nobody_took_is_gone_when_the_next_pass_begins() -> None:
    model, x = network(), inputs()
    for _ in range(3):
        model(x)
    model[:3](x)
    add_past_autograd(model[3].lora_B)
    check(model, x)


def test_networks_that_take_turns_see_their_own_factors() -> None:
    one, two, x = network(), network(), inputs()
    for _ in range(3):
        for model in (one, two):
            check(model, x)
        for layer in (*one, *two):
            layer.lora_B.data.mul_(-1.5)
    for model in (two, one, two):
        check(model, x)


def test_another_first_layer_takes_over_when_the_first_is_called_no_more() -> None:
    model, x = network(), inputs()
    model(x)
    counts = [forward_casts(model[1:], x) for _ in range(6)]
    assert counts[0] <= 3
    assert counts[-1] == 1


def test_two_passes_before_a_backward_pass_keep_their_own_factors() -> None:
    model, x = network(), inputs()
    model(x).sum().backward()
    first = model(x)
    second = model(x)
    gradients = [torch.autograd.grad(y.sum(), list(model.parameters())[1:3]) for y in (first, second)]
    for found, wanted in zip(*gradients, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_computes_with_the_same_factors(reentrant: bool) -> None:
    model, x = network(), inputs().requires_grad_()
    factors = [factor for layer in lora_layers(model).values() for factor in layer.lora_factors().values()]

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        run(x).sum().backward()
        found = [factor.grad for factor in factors]
        model.zero_grad()
        return [gradient for gradient in found if gradient is not None]

    for _ in range(3):
        plain = gradients(model)
        saved = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant))  # type: ignore[arg-type, return-value]
        assert len(plain) == len(factors)
        assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


def test_nothing_is_kept_of_a_network_that_is_gone() -> None:
    gc.collect()
    model, x = network(), inputs()
    for _ in range(3):
        model(x)
    groups = factor_copies._passes.groups
    known = {id(layer.lora_A) for layer in model} & {id(A) for A in groups}
    assert len(known) == 4
    before = len(groups)
    del model
    gc.collect()
    assert len(groups) == before - 4


def test_gradients_have_the_type_of_their_factors() -> None:
    model, x = network(), inputs()
    model[0].lora_A = nn.Parameter(model[0].lora_A.detach().bfloat16())
    model(x).sum().backward()
    for layer in lora_layers(model).values():
        for factor in layer.lora_factors().values():
            assert factor.grad is not None
            assert factor.grad.dtype == factor.dtype


def test_copies_lie_where_products_are_fast_whatever_is_copied_with_them() -> None:
    """Sizes that fill no line of the cache: each A of a group right below the other, all else at 64 bytes."""
    groups = [
        factor_copies._Given([torch.randn(r, 5) for r in ranks], [torch.randn(7, r) for r in ranks], torch.bfloat16)
        for ranks in ([3, 1], [1], [2, 5, 1])
    ]
    for given, copies in zip(groups, factor_copies._cast(groups), strict=True):
        torch.testing.assert_close(copies.A, torch.cat(list(given.As)).bfloat16(), rtol=0, atol=0)
        for B, copied in zip(given.Bs, copies.Bs, strict=True):
            torch.testing.assert_close(copied, B.bfloat16(), rtol=0, atol=0)
        assert {tensor.data_ptr() % 64 for tensor in (copies.A, *copies.Bs)} == {0}
