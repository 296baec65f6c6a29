"""Layers that are given one tensor are computed together, and nobody can tell but by the clock."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, disable_lora, inject_lora, lora_layers, remove_lora
from lightning_lora.lora.layers import siblings
from lightning_lora.lora.layers.siblings import restore_siblings, sibling_names
from tests.support.tiny_models import llama, loss, wake

WIDTH = 12


class Attention(nn.Module):
    """Three projections of one input; ``skip`` leaves out the last."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 8, bias=False), nn.Linear(WIDTH, 8)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.q(x), self.k(x)
        mixed = query[..., :8].tanh() * key
        return mixed if self.skip else mixed + self.v(x).sigmoid()


def adapted(dropout: float = 0.0) -> Attention:
    torch.manual_seed(0)
    module = Attention()
    inject_lora(module, LoRAConfig(rank=2, dropout=dropout, rank_pattern={"k": 3}, alpha_pattern={"v": 5.0}))
    wake(module)
    return module


def step(module: nn.Module) -> None:
    """What an optimizer does to the factors as far as siblings care: change them in place."""
    with torch.no_grad():
        for layer in lora_layers(module).values():
            for factor in layer.lora_factors().values():
                factor.mul_(1.01)


def seen(module: nn.Module, x: Tensor) -> None:
    """A forward pass that shows who follows whom, and a step after it."""
    module(x)
    step(module)


def num_nodes(y: Tensor) -> int:
    """Fused functions in the graph behind ``y``."""
    found, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [following for following, _ in node.next_functions]
    return sum(node.name().startswith("FusedLinears") for node in found)


def gradients(module: nn.Module, x: Tensor, y: Tensor | None = None) -> list[Tensor]:
    factors = [factor for layer in lora_layers(module).values() for factor in layer.lora_factors().values()]
    output: Tensor = module(x) if y is None else y
    return list(torch.autograd.grad(output.square().sum(), [x, *factors], allow_unused=True))


def alone(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients with every layer by itself."""
    with monkeypatch.context() as patch:
        patch.setattr(siblings, "_ready_siblings", lambda group, first, x: {})
        torch.manual_seed(4)
        y = module(x)
        assert num_nodes(y) in (2, 3)
        return y, gradients(module, x, y)


def inputs() -> Tensor:
    return torch.randn(4, 5, WIDTH, requires_grad=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_siblings_are_one_function_with_the_values_and_gradients_of_three(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = adapted(dropout), inputs()
    seen(module, x)
    torch.manual_seed(4)
    y = module(x)
    assert num_nodes(y) == 1
    wanted, expected = alone(module, x, monkeypatch)
    torch.testing.assert_close(y, wanted)
    for ours, theirs in zip(gradients(module, x, y), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_changes_while_a_backward_pass_is_to_come() -> None:
    module = adapted()
    outputs = [module(inputs()) for _ in range(3)]
    assert [num_nodes(y) for y in outputs] == [3, 3, 3]
    for y in outputs[:2]:
        y.sum().backward()
    assert num_nodes(module(inputs())) == 3, "one is still to come"
    outputs[2].sum().backward()
    together = module(inputs())
    assert num_nodes(together) == 1
    module.skip = True
    module(inputs())
    module(inputs())
    module.skip = False
    assert num_nodes(module(inputs())) == 1, "the first is still to come"
    del together
    assert num_nodes(module(inputs())) == 3


def test_a_layer_passed_over_is_not_computed_again_and_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = adapted(), inputs()
    seen(module, x)
    module.skip = True
    y = module(x)
    wanted, expected = alone(module, x, monkeypatch)
    torch.testing.assert_close(y, wanted)
    for ours, theirs in zip(gradients(module, x, y), expected, strict=True):
        assert theirs is None or torch.allclose(ours, theirs, atol=1e-6)
    module(inputs())
    step(module)
    module.skip = False
    assert num_nodes(module(inputs())) == 3


def test_the_same_layer_twice_on_one_tensor_is_computed_twice() -> None:
    module, x = adapted(), inputs()
    seen(module, x)
    both = module(x) + module(x)
    assert num_nodes(both) == 2
    torch.testing.assert_close(both, 2 * module(x))


def test_a_tensor_changed_in_place_is_another_tensor() -> None:
    module, x = adapted(), inputs().detach()
    seen(module, x)
    module.q(x)
    x.add_(1)
    torch.testing.assert_close(module.k(x), module.k(x.clone()))


@pytest.mark.parametrize("change", ["disabled", "hook", "eval", "bfloat16", "trained in full"])
def test_a_sibling_that_computes_otherwise_computes_alone(change: str) -> None:
    module, x = adapted(dropout=0.3 if change == "eval" else 0.0), inputs()
    seen(module, x)
    if change == "disabled":
        with disable_lora(module.k):
            y, wanted = module.q(x), module.k(x)
            torch.testing.assert_close(wanted, nn.functional.linear(x, module.k.weight))
            assert num_nodes(y) == 1
            assert num_nodes(wanted) == 0
        return
    if change == "hook":
        module.k.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
        module.q(x)
        torch.testing.assert_close(module.k(x), module.k.forward(2 * x))
        return
    if change == "eval":
        module.k.eval()
        module.q(x)
        torch.testing.assert_close(module.k(x), module.k(x.clone()))
        return
    if change == "bfloat16":
        module.k.to(torch.bfloat16)
        module.q(x)
        with pytest.raises(RuntimeError, match="dtype"):
            module.k(x)
        return
    module.k.weight.requires_grad_(True)
    module(x).sum().backward()
    assert module.k.weight.grad is not None


def test_without_gradients_nobody_waits_for_anybody() -> None:
    module, x = adapted(), inputs()
    seen(module, x)
    module.q(x)
    with torch.no_grad():
        assert module.k(x).grad_fn is None
        assert module(x).grad_fn is None


def test_a_copy_and_a_layer_without_adapter_are_themselves() -> None:
    module, x = adapted(), inputs()
    seen(module, x)
    other = copy.deepcopy(module)
    step(other)
    module.q(x)
    torch.testing.assert_close(other.k(x), other.k(x.clone()))
    assert not torch.equal(other.k(x), module.k(x))
    remove_lora(module)
    assert num_nodes(module(x)) == 0


def test_what_was_seen_can_be_taken_elsewhere() -> None:
    module, x = adapted(), inputs()
    module(x)
    assert sibling_names(module) == {"q": ["k", "v"]}
    other = adapted()
    restore_siblings(other, {"q": ["k", "v"], "gone": ["k"]})
    assert num_nodes(other(x)) == 1
    module(x)
    module.skip = True
    module(x)
    assert sibling_names(module) == {"q": []}
    restore_siblings(other, sibling_names(module))
    assert [num_nodes(other(inputs())) for _ in range(2)] == [3, 3]


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training_goes_the_same_way_with_and_without(reentrant: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> list[float]:
        torch.manual_seed(0)
        model: Any = llama()
        inject_lora(model, LoRAConfig(rank=4, dropout=0.2))
        wake(model)
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(1)
        losses = []
        for _ in range(4):
            for _ in range(2):
                current = loss(model)
                current.backward()
                losses.append(float(current.detach()))
            optimizer.step()
            optimizer.zero_grad()
        return losses

    together = train()
    with monkeypatch.context() as patch:
        patch.setattr(siblings, "_ready_siblings", lambda group, first, x: {})
        apart = train()
    assert together == pytest.approx(apart, rel=1e-5)
    assert together[-1] < together[0]


def test_a_llama_has_four_functions_a_block() -> None:
    model: Any = llama()
    inject_lora(model, LoRAConfig(rank=2))
    wake(model)
    blocks = model.config.num_hidden_layers
    assert num_nodes(loss(model)) == 7 * blocks
    step(model)
    assert num_nodes(loss(model)) == 4 * blocks
