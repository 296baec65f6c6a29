"""Layers with a magnitude: the formula written out in float64, and the laws of every adapted layer."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    ConfigError,
    LoRAConfig,
    disable_lora,
    inject_lora,
    lora_layers,
    lora_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lightning_lora.lora.functional import row_norms
from tests.lora.layers.dora_layers import LAYERS, built, every_layer, wake


def written_out(base: nn.Module, A: Tensor, B: Tensor, m: Tensor, x: Tensor, features_last: bool) -> Tensor:
    """The paper's formula, with the norm as a constant."""
    weight: Any = base[0].weight  # pyright: ignore[reportIndexIssue]
    matrix = weight.T if features_last else weight.flatten(1)
    direction = matrix + 5.0 / 3 * B @ A
    whole = m[:, None] * direction / direction.detach().square().sum(1, keepdim=True).sqrt()
    whole = whole.T if features_last else whole.reshape(weight.shape)
    return functional_call(base, {"0.weight": whole}, (x,))


@every_layer
def test_outputs_and_gradients_are_those_of_the_formula(name: str) -> None:
    base, module, x = built(name)
    wake(module)
    own = {key.removeprefix("0."): value.clone().requires_grad_() for key, value in lora_state_dict(module).items()}
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    y = module(inputs[0])
    expected = written_out(base, own["lora_A"], own["lora_B"], own["lora_magnitude"], inputs[1], LAYERS[name][2])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(y.shape, dtype=y.dtype)
    for result in (y, expected):
        (result * weights).sum().backward()
    layer = lora_layers(module)["0"]
    for key, tensor in own.items():
        torch.testing.assert_close(getattr(layer, key).grad, tensor.grad, rtol=1e-11, atol=1e-11)
    assert all(bool(tensor.grad.any()) for tensor in own.values() if tensor.grad is not None)
    if x.is_floating_point():
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-11, atol=1e-11)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_layer_changes_no_bit_and_merging_does_not_either(name: str, dtype: torch.dtype) -> None:
    base, module, x = built(name, dtype)
    base.requires_grad_(False)
    for training in (True, False):
        assert torch.equal(module.train(training)(x), base(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), base(x))
    merge_lora(module)
    assert torch.equal(module(x), base(x))
    unmerge_lora(module)
    wake(module)
    assert not torch.allclose(module(x), base(x), atol=1e-2)
    with disable_lora(module):
        assert torch.equal(module(x), base(x))
    remove_lora(module)
    assert not any("lora" in key for key in module.state_dict())
    assert type(module[0]) is type(base[0])  # pyright: ignore[reportIndexIssue]


@every_layer
def test_merging_does_not_change_the_function_and_unmerging_restores_it(name: str) -> None:
    _, module, x = built(name)
    wake(module)
    weight = lora_layers(module)["0"].weight.detach().clone()
    y = module(x)
    merge_lora(module)
    torch.testing.assert_close(module(x), y, rtol=1e-12, atol=1e-12)
    unmerge_lora(module)
    assert torch.equal(lora_layers(module)["0"].weight, weight)
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("name", ["linear", "transposed linear", "convolution"])
def test_dropout_acts_on_base_and_update_alike(name: str) -> None:
    # What the magnitude adds to the base's own product sees the dropped input too, as in the paper's code and in PEFT.
    base, module, x = built(name)
    remove_lora(module)
    inject_lora(module, LoRAConfig(rank=3, alpha=5.0, targets=["0"], dora=True, dropout=0.4))
    assert torch.equal(module.train()(x), base.train()(x))
    wake(module)
    state = {key.removeprefix("0."): value for key, value in lora_state_dict(module).items()}
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.4)
    moved = written_out(base, state["lora_A"], state["lora_B"], state["lora_magnitude"], dropped, LAYERS[name][2])
    torch.manual_seed(5)
    torch.testing.assert_close(module(x), base(x) + moved - base(dropped), rtol=1e-11, atol=1e-11)
    assert torch.equal(module.eval()(x), module(x))


def test_a_row_of_zeros_gives_no_nan_and_learns() -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        module[0].weight[1].zero_()  # pyright: ignore[reportIndexIssue]
    base = copy.deepcopy(module)
    inject_lora(module, LoRAConfig(rank=2, targets=["0"], dora=True))
    x, optimizer = torch.randn(8, 4), torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    assert torch.equal(module(x), base(x))
    for _ in range(4):
        optimizer.zero_grad()
        (module(x) - x[:, :3]).square().mean().backward()
        assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)
        optimizer.step()
    assert not torch.equal(module(x)[:, 1], base(x)[:, 1])


def test_norms_do_not_depend_on_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, A, B = torch.randn(50, 30), torch.randn(3, 30), torch.randn(50, 3)
    whole = row_norms(weight, A, B, 0.5)
    monkeypatch.setattr("lightning_lora.lora.functional.magnitude._BLOCK", 100)
    torch.testing.assert_close(row_norms(weight, A, B, 0.5), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole, (weight + 0.5 * B @ A).norm(dim=1).double(), rtol=1e-5, atol=0)


class OwnForward(nn.Linear):
    """A linear layer that does more than multiply."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(input, self.weight / self.weight.mean(), self.bias))


def test_a_forward_of_its_own_sees_the_effective_weight() -> None:
    module = nn.Sequential(OwnForward(4, 3).double())
    inject_lora(module, LoRAConfig(rank=2, targets=["0"], dora=True))
    wake(module)
    x = torch.randn(5, 4, dtype=torch.float64)
    y = module(x)
    y.sum().backward()
    assert lora_layers(module)["0"].lora_magnitude.grad is not None
    merge_lora(module)
    torch.testing.assert_close(module(x), y)
    with pytest.raises(ConfigError, match=r"dropout=0\.1 cannot act"):
        inject_lora(nn.Sequential(OwnForward(4, 3)), LoRAConfig(rank=2, targets=["0"], dora=True, dropout=0.1))


def test_layers_with_one_input_are_computed_together_with_equal_results() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q(x), self.k(x), self.v(x)], -1)

    torch.manual_seed(0)
    module = Attention().double()
    inject_lora(module, LoRAConfig(rank=2, dora=True))
    wake(module)
    x, results = torch.randn(6, 8, dtype=torch.float64), []
    for _ in range(3):
        module.zero_grad()
        y = module(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in module.parameters() if p.requires_grad)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


def test_activation_checkpointing_and_deterministic_mode_give_the_same_gradients() -> None:
    _, module, x = built("linear")
    wake(module)
    found = []
    for run in (lambda: module(x), lambda: checkpoint(module, x, use_reentrant=False)):
        module.zero_grad()
        run().square().sum().backward()
        found.append([p.grad for p in module.parameters() if p.requires_grad])
    torch.use_deterministic_algorithms(True)
    try:
        module.zero_grad()
        module(x).square().sum().backward()
        found.append([p.grad for p in module.parameters() if p.requires_grad])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for grads in found[1:] for a, b in zip(grads, found[0], strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_layer_computes_the_same_and_is_fresh_at_first() -> None:
    base, module, x = built("linear", torch.float32)
    compiled = torch.compile(module, fullgraph=True)
    # The ratio is 1 in compiled code too, where sums are taken in another order.
    assert torch.equal(compiled(x), base(x))
    wake(module)
    expected = module(x)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    y = compiled(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for name, p in module.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5)
    assert gradients.keys() == {"0.lora_A", "0.lora_B", "0.lora_magnitude"}
