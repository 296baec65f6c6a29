"""Gated inputs are computed again instead of kept: the same gradients from fewer tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import peak_on_cpu
from lightning_lora.lora.functional import AdaptedWeight, fused_lora_linears
from lightning_lora.lora.functional.gated_input import gated_input

T, FF, OUT, R = 6, 10, 7, 3


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


MADE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu times": lambda gate, up: F.silu(gate) * up,
    "times silu": lambda gate, up: up * F.silu(gate),
    "gelu times": lambda gate, up: F.gelu(gate) * up,
    "tanh gelu times": lambda gate, up: tanh_gelu(gate) * up,
}


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def fused(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return fused_lora_linears(x, [AdaptedWeight(W, None, A, B, scale)])[0]


def layer(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A fused layer and its formula, of a frozen weight and two factors."""
    W = torch.randn(OUT, FF, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    A, B = leaves((R, FF), (OUT, R))
    return fused(x, W, A, B, 1.5), [A, B, F.linear(x, W) + 1.5 * x @ A.T @ B.T]


@pytest.mark.parametrize("halves", [False, True], ids=["two tensors", "halves of one"])
@pytest.mark.parametrize("made", MADE)
def test_gradients_are_those_of_the_graph(made: str, halves: bool) -> None:
    gate, up, both = leaves((2, T, FF), (2, T, FF), (2, T, 2 * FF))
    inputs = [both] if halves else [gate, up]
    x = MADE[made](*((both * 1).chunk(2, -1) if halves else (gate * 1, up * 1)))
    found = gated_input(x)
    assert found is not None
    assert len(found.sources) == (1 if halves else 2)
    y, (A, B, formula) = layer(x)
    d_y = torch.randn_like(y)
    ours = torch.autograd.grad(y, [A, B, *inputs], d_y, retain_graph=True, allow_unused=True)
    wanted = torch.autograd.grad(formula, [A, B, *inputs], d_y, allow_unused=True)
    assert [g is None for g in ours] == [g is None for g in wanted]
    for a, b in zip(ours, wanted, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("change", [None, "before", "by half"])
def test_halves_of_an_adapted_layers_output_are_known_as_such(change: str | None) -> None:
    W = torch.randn(2 * FF, R, dtype=torch.float64)
    x, A_before, B_before = leaves((2, T, R), (1, R), (2 * FF, 1))
    both = fused(x, W, A_before, B_before, 1.0)
    if change == "before":
        both.mul_(2)
    gate, up = both.chunk(2, -1)
    if change == "by half":
        # Chunks of views may not be changed in place, but half of the whole may.
        both[..., :FF].mul_(2)
        gate, up = both.chunk(2, -1)
    activated = F.silu(gate) * up
    found = gated_input(activated)
    assert found is not None
    assert len(found.sources) == 1
    assert found.sources[0] is both
    y, (A, B, formula) = layer(activated)
    needed, d_y = [x, A_before, B_before, A, B], torch.randn_like(y)
    ours = torch.autograd.grad(y, needed, d_y, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(formula, needed, d_y), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("made", MADE)
def test_they_can_be_differentiated_again(made: str) -> None:
    gate, up, A, B = leaves((T, FF), (T, FF), (R, FF), (OUT, R))
    W = torch.randn(OUT, FF, dtype=torch.float64)

    def function(gate: Tensor, up: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return fused(MADE[made](gate * 1, up * 1), W, A, B, 1.5)

    assert torch.autograd.gradcheck(function, (gate, up, A, B))
    assert torch.autograd.gradgradcheck(function, (gate, up, A, B))


def test_the_input_itself_is_not_kept() -> None:
    gate, up = leaves((T, FF), (T, FF))
    activated = F.silu(gate * 1)
    x = activated * up
    W = torch.randn(OUT, FF, dtype=torch.float64)
    A, B = leaves((R, FF), (OUT, R))
    y = fused(x, W, A, B, 1.0)
    alive = weakref.ref(x), weakref.ref(activated)
    del x, activated
    assert [tensor() for tensor in alive] == [None, None]
    y.sum().backward()
    assert gate.grad is not None
    assert up.grad is not None


def test_an_input_without_a_known_origin_is_kept_as_it_is() -> None:
    (x,) = leaves((T, FF))
    for unknown in (
        x,
        x * 2,
        F.relu(x),
        F.silu(x),
        F.silu(x) + 1,
        F.silu(x) * x[:1],
        F.silu(x).view(-1),
        F.silu(x.detach()),
    ):
        assert gated_input(unknown) is None


def watched(how: str, hook: list[Tensor]) -> tuple[Tensor, Any]:
    """An input with a gradient on the way that somebody asks for, and a function that returns what they got."""
    gate, up = leaves((T, FF), (T, FF))
    activated = F.silu(gate * 1)
    if how == "hook on the activation":
        activated.register_hook(hook.append)
    x = activated * (up * 1)
    if how == "gradient of the input":
        x.retain_grad()
    if how == "hook on the input":
        x.register_hook(hook.append)
    if how == "changed in place":
        with torch.no_grad():
            x.clamp_(min=0)
    return x, lambda: x.grad if how == "gradient of the input" else hook


@pytest.mark.parametrize("how", ["hook on the activation", "gradient of the input", "hook on the input"])
def test_who_asks_for_gradients_on_the_way_gets_them(how: str) -> None:
    x, got = watched(how, [])
    assert gated_input(x) is None
    layer(x)[0].sum().backward()
    assert got() is not None
    assert len(got())


def test_a_value_changed_behind_autograds_back_is_kept() -> None:
    x, _ = watched("changed in place", [])
    y, (A, B, formula) = layer(x)
    for ours, wanted in zip(
        torch.autograd.grad(y, [A, B], torch.ones_like(y), retain_graph=True),
        torch.autograd.grad(formula, [A, B], torch.ones_like(y)),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    gate, up, A, B = leaves((T, FF), (T, FF), (R, FF), (OUT, R))
    W = torch.randn(OUT, FF, dtype=torch.float64)

    def block(gate: Tensor, up: Tensor) -> Tensor:
        return fused(F.silu(gate * 1) * up, W, A, B, 1.0)

    plain = torch.autograd.grad(block(gate, up).sum(), [gate, up, A, B])
    block_again: Any = checkpoint(block, gate, up, use_reentrant=reentrant)
    block_again.sum().backward()
    for found, expected in zip([gate, up, A, B], plain, strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad, expected)


def test_hooks_on_saved_tensors_see_the_input() -> None:
    gate, up = leaves((T, FF), (T, FF))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert gated_input(F.silu(gate) * up) is None


def test_backward_holds_two_tensors_of_the_width_at_once() -> None:
    """It is where a training step of a transformer holds the most."""
    tokens, width = 64, 1024
    gate, up = (torch.randn(tokens, width, requires_grad=True) for _ in range(2))
    W, A, B = torch.randn(8, width), torch.randn(2, width, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    y = fused(F.silu(gate) * up, W, A, B, 1.0)
    inputs = [A, B, gate, up]
    peak = peak_on_cpu(lambda: torch.autograd.grad(y, inputs, torch.ones_like(y)))
    of_width = 4 * tokens * width
    assert 2 * of_width < peak < 2.5 * of_width


@pytest.mark.parametrize("halves", [False, True], ids=["two tensors", "halves of one"])
@pytest.mark.parametrize("made", MADE)
def test_a_kept_gate_gives_the_same_bits(made: str, halves: bool) -> None:
    W = torch.randn(OUT, FF)
    shapes = (R, FF), (OUT, R), (T, FF), (T, FF), (T, 2 * FF)
    A, B, gate, up, both = (torch.randn(shape, requires_grad=True) for shape in shapes)
    inputs, found = [both] if halves else [gate, up], []
    for keep in (False, True):
        x = MADE[made](*((both * 1).chunk(2, -1) if halves else (gate * 1, up * 1)))
        (y,) = fused_lora_linears(x, [AdaptedWeight(W, None, A, B, 1.5, keeps_gate=keep)])
        node: Any = y.grad_fn
        assert (node.settings.activation is None) is keep
        found.append(torch.autograd.grad(y.square().sum(), [A, B, *inputs]))
    assert all(torch.equal(again, kept) for again, kept in zip(*found, strict=True))
