"""The fused linear layer against the formula it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_lora import LoRAConfig, inject_lora, lora_layers
from lightning_lora.lora.functional import AdaptedWeight, can_fuse, fused_linear, fused_lora_linears
from lightning_lora.lora.functional.fused_linear import merging_pays
from lightning_lora.lora.layers import linear
from tests.support.tiny_models import gpt2, llama, loss, wake

IN, OUT, R, SCALE = 12, 10, 3, 1.7


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def fused(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, dropout: float = 0.0) -> Tensor:
    return fused_lora_linears(x, [AdaptedWeight(W, b, A, B, SCALE)], dropout)[0]


def formula(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    return F.linear(x, W, b) + SCALE * (x @ A.T @ B.T)


@pytest.fixture(params=["split", "merged"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute, regardless of which one pays for tensors so small."""
    monkeypatch.setattr(fused_linear, "merging_pays", lambda x, layers: request.param == "merged")
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (0,)], ids=str)
def test_values_and_gradients_are_the_formulas(shape: tuple[int, ...], bias: bool) -> None:
    W, b = numbers(OUT, IN), numbers(OUT) if bias else None
    leaves = [numbers(*shape, IN), numbers(R, IN), numbers(OUT, R)]
    x, A, B = (leaf.requires_grad_() for leaf in leaves)
    ours, wanted = fused(x, W, b, A, B), formula(x, W, b, A, B)
    torch.testing.assert_close(ours, wanted)
    gradient = numbers(*ours.shape)
    for found, expected in zip(
        torch.autograd.grad(ours, (x, A, B), gradient), torch.autograd.grad(wanted, (x, A, B), gradient), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_the_output_may_be_changed_in_place() -> None:
    A, B = numbers(R, IN).requires_grad_(), numbers(OUT, R).requires_grad_()
    y = fused(numbers(2, 3, IN), numbers(OUT, IN), None, A, B)
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
    wanted = [F.linear(x, W, b) + scale * (x @ A.T @ B.T) for W, b, A, B, scale, *_ in layers]
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
    fused(x, numbers(OUT, IN), None, A, B).sum().backward()
    assert tuple(leaf.grad is not None for leaf in (x, A, B)) == learning


@pytest.mark.slow
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_can_be_differentiated_again(dropout: float) -> None:
    leaves = [numbers(4, IN), numbers(R, IN), numbers(OUT, R)]
    x, A, B = (leaf.requires_grad_() for leaf in leaves)
    W = numbers(OUT, IN)

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(0)
        return fused(x, W, None, A, B, dropout)

    assert torch.autograd.gradcheck(function, (x, A, B))
    assert torch.autograd.gradgradcheck(function, (x, A, B))


def test_what_is_kept_for_backward_is_the_input_itself_and_the_small_product() -> None:
    x = numbers(50, IN, dtype=torch.float32).requires_grad_()
    W, A, B = (numbers(*s, dtype=torch.float32) for s in ((OUT, IN), (R, IN), (OUT, R)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fused(x, W, None, A.requires_grad_(), B.requires_grad_(), 0.5)
    own = [tensor for tensor in kept if tensor.data_ptr() not in {t.data_ptr() for t in (x, W, A, B)}]
    assert [tuple(tensor.shape) for tensor in own] == [(50, R)]


def test_a_frozen_A_keeps_no_input() -> None:
    x, W, A = numbers(50, IN).requires_grad_(), numbers(OUT, IN), numbers(R, IN)
    B = numbers(OUT, R).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = fused(x, W, None, A, B)
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in kept)
    d_y = numbers(*y.shape)
    for found, wanted in zip(
        torch.autograd.grad(y, (x, B), d_y, retain_graph=True),
        torch.autograd.grad(formula(x, W, None, A, B), (x, B), d_y),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
    with pytest.raises(NotImplementedError, match="no second derivative where every A is frozen"):
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
    miss = (layer(x.bfloat16()) - exact).norm()
    by_formula(monkeypatch)
    assert miss <= (layer(x.bfloat16()) - exact).norm() * 1.01


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
