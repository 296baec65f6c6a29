"""The fused linear layer against the formula it stands for."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, inject_lora, lora_layers
from lightning_lora.lora.functional import AdaptedWeight, can_fuse, fused_linear, fused_lora_linear, fused_lora_linears
from lightning_lora.lora.functional.fused_linear import merging_pays
from lightning_lora.lora.functional.seeded_dropout import drop, kept_share, shared_seed
from lightning_lora.lora.layers import linear
from tests.support.tiny_models import gpt2, llama, loss, wake

IN, OUT, R, SCALE = 12, 10, 3, 1.7


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def formula(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    return F.linear(x, W, b) + SCALE * (x @ A.T @ B.T)


@pytest.fixture(params=["split", "merged"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute, whatever would pay for tensors so small."""
    monkeypatch.setattr(fused_linear, "merging_pays", lambda x, layers: request.param == "merged")
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (0,)], ids=str)
def test_values_and_gradients_are_the_formulas(shape: tuple[int, ...], bias: bool) -> None:
    W, b = numbers(OUT, IN), numbers(OUT) if bias else None
    leaves = [numbers(*shape, IN), numbers(R, IN), numbers(OUT, R)]
    x, A, B = (leaf.requires_grad_() for leaf in leaves)
    ours, wanted = fused_lora_linear(x, W, b, A, B, SCALE), formula(x, W, b, A, B)
    torch.testing.assert_close(ours, wanted)
    gradient = numbers(*ours.shape)
    for found, expected in zip(
        torch.autograd.grad(ours, (x, A, B), gradient), torch.autograd.grad(wanted, (x, A, B), gradient), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_the_output_may_be_changed_in_place() -> None:
    A, B = numbers(R, IN).requires_grad_(), numbers(OUT, R).requires_grad_()
    y = fused_lora_linear(numbers(2, 3, IN), numbers(OUT, IN), None, A, B, SCALE)
    y.mul_(2)
    y.sum().backward()
    assert A.grad is not None


@pytest.mark.usefixtures("way")
def test_layers_with_one_input_are_the_formula_of_each() -> None:
    x = numbers(2, 3, IN).requires_grad_()
    layers = [
        AdaptedWeight(
            numbers(out, IN), bias, numbers(rank, IN).requires_grad_(), numbers(out, rank).requires_grad_(), scale
        )
        for out, rank, bias, scale in ((OUT, 3, None, 0.5), (4, 1, numbers(4), 2.0), (7, 2, None, 1.0))
    ]
    leaves = [x, *(factor for layer in layers for factor in (layer.A, layer.B))]
    ours = fused_lora_linears(x, layers)
    wanted = [F.linear(x, W, b) + scale * (x @ A.T @ B.T) for W, b, A, B, scale in layers]
    for used in ((0, 1, 2), (1,)):
        d_ys = [numbers(*ours[i].shape) for i in used]
        found, expected = (
            torch.autograd.grad([ys[i] for i in used], leaves, d_ys, retain_graph=True, allow_unused=True)
            for ys in (ours, wanted)
        )
        for gradients in zip(found, expected, leaves, strict=True):
            # Autograd has no gradient for layers whose output nothing uses, the function may have one of zero.
            a, b = (torch.zeros_like(gradients[2]) if g is None else g for g in gradients[:2])
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("learning", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_the_gradients_asked_for_are_computed(learning: tuple[bool, ...]) -> None:
    x, A, B = (
        leaf.requires_grad_(learns)
        for leaf, learns in zip((numbers(4, IN), numbers(R, IN), numbers(OUT, R)), learning, strict=True)
    )
    fused_lora_linear(x, numbers(OUT, IN), None, A, B, SCALE).sum().backward()
    assert tuple(leaf.grad is not None for leaf in (x, A, B)) == learning


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_can_be_differentiated_again(dropout: float) -> None:
    leaves = [numbers(4, IN), numbers(R, IN), numbers(OUT, R)]
    x, A, B = (leaf.requires_grad_() for leaf in leaves)
    W = numbers(OUT, IN)

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(0)
        return fused_lora_linear(x, W, None, A, B, SCALE, dropout)

    assert torch.autograd.gradcheck(function, (x, A, B))
    assert torch.autograd.gradgradcheck(function, (x, A, B))


def test_what_is_kept_for_backward_is_the_input_itself_and_the_small_product() -> None:
    x = numbers(50, IN, dtype=torch.float32).requires_grad_()
    W, A, B = (numbers(*s, dtype=torch.float32) for s in ((OUT, IN), (R, IN), (OUT, R)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fused_lora_linear(x, W, None, A.requires_grad_(), B.requires_grad_(), SCALE, 0.5)
    own = [tensor for tensor in kept if tensor.data_ptr() not in {t.data_ptr() for t in (x, W, A, B)}]
    assert [tuple(tensor.shape) for tensor in own] == [(50, R)]


def test_a_frozen_A_keeps_no_input() -> None:
    x, W, A = numbers(50, IN).requires_grad_(), numbers(OUT, IN), numbers(R, IN)
    B = numbers(OUT, R).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = fused_lora_linear(x, W, None, A, B, SCALE)
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in kept)
    d_y = numbers(*y.shape)
    for found, wanted in zip(
        torch.autograd.grad(y, (x, B), d_y, retain_graph=True),
        torch.autograd.grad(formula(x, W, None, A, B), (x, B), d_y),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(y, (x, B), d_y, create_graph=True)


def test_merging_is_for_many_tokens_through_small_layers_in_full_precision() -> None:
    def pays(rows: int, num_in: int, num_out: int, dtype: torch.dtype = torch.float32) -> bool:
        A, B = torch.empty(8, num_in, requires_grad=True), torch.empty(num_out, 8)
        layer = AdaptedWeight(torch.empty(num_out, num_in), None, A, B, 1.0)
        return merging_pays(torch.empty(rows, num_in, dtype=dtype), [layer])

    assert pays(8192, 64, 64)
    assert not pays(64, 64, 64)
    assert not pays(8192, 64, 64, torch.bfloat16)
    assert not pays(1024, 1024, 64)
    assert not pays(1024, 64, 1024)


# Dropout


def test_dropout_keeps_the_share_it_says_and_the_expectation() -> None:
    x = torch.ones(400, 500)
    for dropout in (0.001, 0.1, 0.5):
        dropped = drop(x, dropout, shared_seed(x.clone(), x)) / kept_share(dropout)
        assert float((dropped > 0).float().mean()) == pytest.approx(kept_share(dropout), abs=0.005)
        assert float(dropped.mean()) == pytest.approx(1, abs=0.01)
        assert abs(kept_share(dropout) - (1 - dropout)) <= 1 / 256


def test_the_update_is_that_of_the_dropped_input() -> None:
    x, A, B = numbers(6, IN).requires_grad_(), numbers(R, IN).requires_grad_(), numbers(OUT, R).requires_grad_()
    W = numbers(OUT, IN)
    torch.manual_seed(3)
    ours = fused_lora_linear(x, W, None, A, B, SCALE, 0.3)
    torch.manual_seed(3)
    dropped = drop(x, 0.3, int(torch.randint(2**62, ()))) / kept_share(0.3)
    wanted = F.linear(x, W) + SCALE * dropped @ A.T @ B.T
    torch.testing.assert_close(ours, wanted)
    gradient = numbers(6, OUT)
    for found, expected in zip(
        torch.autograd.grad(ours, (x, A, B), gradient), torch.autograd.grad(wanted, (x, A, B), gradient), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_layers_with_the_same_input_share_a_seed_and_others_do_not() -> None:
    x, y = numbers(4, IN), numbers(4, IN)
    first = shared_seed(x, "query")
    assert shared_seed(x, "key") == first
    second = shared_seed(x, "query")
    assert second != first, "a second run on the same batch"
    assert shared_seed(x, "key") == second
    assert shared_seed(y, "value") != second
    again = shared_seed(x, "value")
    assert again not in (first, second), "another tensor came between"
    x.add_(1)
    assert shared_seed(x, "gate") != again, "the tensor was changed in place"


def test_seeds_follow_torchs_own() -> None:
    def draw() -> Tensor:
        torch.manual_seed(5)
        x = torch.ones(4, IN)
        return drop(x, 0.5, shared_seed(x, x))

    assert torch.equal(draw(), draw())
    torch.manual_seed(6)
    x = torch.ones(4, IN)
    assert not torch.equal(drop(x, 0.5, shared_seed(x, x)), draw())


def test_no_input_is_kept_alive() -> None:
    x = numbers(4, IN)
    shared_seed(x, None)
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None


# In models


def by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "can_fuse", lambda *tensors: False)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_model_has_the_loss_and_gradients_of_the_formula(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    inject_lora(model, LoRAConfig(rank=4))
    wake(model)
    factors = [factor for layer in lora_layers(model).values() for factor in layer.lora_factors().values()]
    ours = loss(model)
    found = torch.autograd.grad(ours, factors)
    by_formula(monkeypatch)
    wanted = loss(model)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=0)
    for gradient, expected in zip(found, torch.autograd.grad(wanted, factors), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(dropout: float, reentrant: bool) -> None:
    block = nn.Sequential(nn.Linear(IN, 16), nn.ReLU(), nn.Linear(16, IN))
    inject_lora(block, LoRAConfig(rank=2, dropout=dropout))
    wake(block)
    x = torch.randn(5, IN, requires_grad=True)
    factors = [factor for layer in lora_layers(block).values() for factor in layer.lora_factors().values()]

    def gradients(run: Any) -> list[Tensor]:
        torch.manual_seed(1)
        block.zero_grad()
        run(x).square().sum().backward()
        return [factor.grad.clone() for factor in factors if factor.grad is not None]

    plain, recomputed = gradients(block), gradients(lambda x: checkpoint(block, x, use_reentrant=reentrant))
    assert len(plain) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def adapted_linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(IN, OUT, dtype=dtype)
    inject_lora(layer, LoRAConfig(rank=R))
    wake(layer)
    return layer


def test_bfloat16_is_no_further_from_float32_than_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 256), torch.randn(64, 256)
    inject_lora(layer, LoRAConfig(rank=8))
    wake(layer)
    exact = layer(x)
    layer.bfloat16()
    for name in ("lora_A", "lora_B"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).float()))
    fused = (layer(x.bfloat16()) - exact).norm()
    by_formula(monkeypatch)
    assert fused <= (layer(x.bfloat16()) - exact).norm() * 1.01


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_where_others_must_see_through_the_formula_is_taken() -> None:
    layer, x = adapted_linear(), torch.randn(4, IN)
    assert can_fuse(x, layer.weight, layer.bias)
    assert not can_fuse(x.double(), layer.weight, layer.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    rows = torch.func.vmap(layer)(x)
    torch.testing.assert_close(rows, layer(x))
    jacobian = torch.func.jacrev(layer)(x[0])
    torch.testing.assert_close(torch.autograd.functional.jacobian(layer, x[0]), jacobian)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x[0], x[1]))).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, jacobian @ x[1])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_linear_with_a_forward_of_its_own_keeps_it() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = Doubling(IN, OUT)
    x = torch.randn(4, IN)
    before = layer(x)
    inject_lora(layer, LoRAConfig(rank=R))
    torch.testing.assert_close(layer(x), before)


def test_base_weights_that_learn_take_the_formula() -> None:
    layer, x = adapted_linear(), torch.randn(4, IN)
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
