"""Any tree of modules and any patterns: adapted as a plain reading of the rules says, or refused with our error."""

from __future__ import annotations

import fnmatch
import warnings
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora import LoRAConfig, LoRAError, inject_lora, lora_layers, lora_state_dict, merge_lora, remove_lora

WIDTH = 4
NAMES = st.sampled_from(["a", "b", "proj", "q_proj", "0", "ünï", "a b", "x-y", "*", "[a]", "lora", "weight_"])


class Tree(nn.Module):
    """Calls its children one after the other; all of them map ``WIDTH`` features to as many."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = torch.tanh(child(x))
        return x


def leaf(kind: str) -> nn.Module:
    return nn.Linear(WIDTH, WIDTH) if kind == "linear" else nn.LayerNorm(WIDTH) if kind == "norm" else nn.Identity()


leaves = st.sampled_from(["linear", "linear", "linear", "norm", "none"])
shapes = st.recursive(
    leaves,
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=3),
)


def build(shape: Any) -> nn.Module:
    if isinstance(shape, dict):
        return Tree({name: build(inner) for name, inner in shape.items()})
    return nn.Sequential(*map(build, shape)) if isinstance(shape, list) else leaf(shape)


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    """A tree in which one module may stand in two places, and two layers may have one weight."""
    torch.manual_seed(0)
    root = Tree({"body": build(draw(shapes)), "more": build(draw(shapes))})
    linears = [module for module in root.modules() if isinstance(module, nn.Linear)]
    if linears and draw(st.booleans()):
        root.add_module("again", draw(st.sampled_from(linears)))
    if len(linears) > 1 and draw(st.integers(0, 3)) == 0:
        linears[0].weight = linears[1].weight
    return root


ANY = NAMES | st.sampled_from(["body", "more.0", "zz", "body.a", "[ab]", "?", ""])


@st.composite
def patterns(draw: st.DrawFn, root: nn.Module) -> str:
    """Mostly one that a layer of the tree has: its whole name, an ending of it, or a glob."""
    layers = [name for name, m in root.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    if not layers or draw(st.integers(0, 9)) == 0:
        return draw(ANY)
    parts = draw(st.sampled_from(layers)).split(".")
    ending = ".".join(parts[draw(st.integers(0, len(parts) - 1)) :])
    return draw(st.sampled_from([".".join(parts), ending, f"{parts[0]}.*", f"*{parts[-1]}", "*"]))


def matches(name: str, pattern: str) -> bool:
    """The documented rule: equal, a dotted suffix, or a glob."""
    return name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)


def expected(root: nn.Module, targets: list[str], exclude: list[str]) -> set[int]:
    """The weights, by identity, that the rules select, of layers under any of their names."""
    named = [
        (name, module) for name, module in root.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)
    ]
    chosen = [m for name, m in named if any(matches(name, pattern) for pattern in targets)]
    left_out = {id(m) for name, m in named if any(matches(name, pattern) for pattern in exclude)}
    return {id(module.weight) for module in chosen if id(module) not in left_out}


@settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(root=trees(), data=st.data())
def test_any_tree_is_adapted_as_the_rules_say_or_refused(root: nn.Module, data: st.DataObject) -> None:
    some = patterns(root)
    targets = data.draw(st.lists(some, min_size=1, max_size=3), "targets")
    exclude = data.draw(st.just([]) | st.lists(some, max_size=1), "exclude")
    ranks = data.draw(st.just({}) | st.dictionaries(some, st.integers(0, 4), max_size=1), "ranks")
    x = torch.randn(2, WIDTH)
    before, keys, names = root(x), list(root.state_dict()), [name for name, _ in root.named_modules()]
    state = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inject_lora(root, LoRAConfig(rank=2, targets=targets, exclude=exclude, rank_pattern=ranks))
        except LoRAError as error:
            assert str(error)  # noqa: PT017 - raising is one of two right outcomes
            assert list(root.state_dict()) == keys
            assert not lora_layers(root)
            return
        adapted = lora_layers(root)
        assert {id(layer.weight) for layer in adapted.values()} == expected(root, targets, exclude)
        assert torch.equal(root(x), before)
        factors = lora_state_dict(root)
        assert [key for key in root.state_dict() if "lora_" not in key] == keys
        assert [name for name, _ in root.named_modules()] == names
        for name, factor in root.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(factor)
        changed = root(x)
        merge_lora(root)
        torch.testing.assert_close(root(x), changed, rtol=1e-4, atol=1e-5)
        remove_lora(root)
    assert not lora_layers(root)
    assert list(root.state_dict()) == keys
    assert all("lora_" in name for name in factors)
    base = {id(layer.weight) for layer in adapted.values()}
    weights = dict(root.named_parameters(remove_duplicate=False))
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.items() if id(tensor) not in base)
