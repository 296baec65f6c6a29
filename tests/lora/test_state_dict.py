"""Adapter tensors and whole modules are copied, saved and loaded without loss."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    AdapterFileError,
    LoRAConfig,
    LoRAError,
    inject_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from tests.lora.models import ALL, BUILDS, adapted, every_build, output
from tests.support import warm
from tests.support.tiny_models import mlp, portrait, wake


@every_build
def test_adapter_state_carries_the_function_to_another_module(name: str) -> None:
    module, inputs = adapted(name)
    state = lora_state_dict(module)
    assert list(state) == [f"{layer}.lora_{side}" for layer in lora_layers(module) for side in "AB"]
    assert not any(tensor.requires_grad for tensor in state.values())
    other, _ = adapted(name, awake=False)
    load_lora_state_dict(other, state)
    assert torch.equal(output(other, inputs), output(module, inputs))


def test_a_single_adapted_layer_has_plain_names() -> None:
    layer = nn.Linear(4, 4)
    inject_lora(layer, LoRAConfig(rank=2))
    assert list(lora_state_dict(layer)) == ["lora_A", "lora_B"]
    assert list(lora_layers(layer)) == [""]


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "missing": (lambda s: s.pop("first.lora_B"), ("1 of 4", "missing first.lora_B")),
    "extra": (lambda s: s.update({"third.lora_A": torch.zeros(1)}), ("1 of 4", "unknown third.lora_A")),
    "shape": (
        lambda s: s.update({"second.lora_A": torch.zeros(3, 32)}),
        ("second.lora_A has shape (3, 32), expected (4, 32)",),
    ),
    "transposed": (lambda s: s.update({"second.lora_A": s["second.lora_A"].T}), ("(32, 4), expected (4, 32)",)),
    "renamed prefix": (
        lambda s: [s.update({f"model.{name}": s.pop(name)}) for name in list(s)],
        ("8 of 4", "missing first.lora_A", "and 3 more"),
    ),
    "empty": (lambda s: s.clear(), ("4 of 4 expected", "missing first.lora_A")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_loading_is_strict_and_never_partial(change: str) -> None:
    module, source = mlp(), mlp()
    for each in (module, source):
        inject_lora(each, ALL)
    wake(source)
    state = lora_state_dict(source)
    damage, words = CHANGES[change]
    damage(state)
    before = portrait(module)
    with pytest.raises(AdapterFileError) as error:
        load_lora_state_dict(module, state)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert isinstance(error.value, LoRAError)
    assert portrait(module) == before


@every_build
@pytest.mark.parametrize("merged", [False, True])
def test_copies_compute_the_same_and_share_nothing(name: str, merged: bool) -> None:
    module, inputs = adapted(name)
    if merged:
        merge_lora(module)
    function = output(module, inputs)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(output(twin, inputs), function)
        assert portrait(twin)["classes"] == portrait(module)["classes"]
        assert portrait(twin)["state"] == portrait(module)["state"]
        wake(twin, seed=9)
        if merged:
            unmerge_lora(twin)
        remove_lora(twin)
        assert torch.equal(output(module, inputs), function)
    build, _, _ = BUILDS[name]
    assert {type(child) for child in twin.modules()} == {type(child) for child in build().modules()}


@pytest.mark.slow
def test_an_adapted_subclass_unpickles_in_another_process(tmp_path: Path) -> None:
    module, inputs = adapted("mixed")
    torch.save((module, inputs, output(module, inputs)), tmp_path / "module.pt")
    code = (
        "import torch; module, inputs, expected = torch.load('module.pt', weights_only=False);"
        "assert torch.equal(module(inputs), expected); print(type(module.own).__name__)"
    )
    done = warm.run("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "LoRADoubled"), done.stderr


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "NaN": (lambda tensor: tensor * float("nan"), "NaN or infinite values"),
    "whole numbers": (lambda tensor: tensor.long(), "is of torch.int64, not of floating point"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "not of floating point"),
    "meta": (lambda tensor: tensor.to("meta"), "has no values"),
    "a list": (lambda tensor: tensor.tolist(), "is list, not a tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_values_that_no_adapter_has_are_refused_and_nothing_is_loaded(case: str) -> None:
    """B44."""
    change, message = WRONG[case]
    module = nn.Sequential(nn.Linear(4, 4))
    inject_lora(module, LoRAConfig(rank=2))
    before = {name: tensor.clone() for name, tensor in lora_state_dict(module).items()}
    with pytest.raises(AdapterFileError, match=message):
        load_lora_state_dict(module, {**before, "0.lora_B": change(before["0.lora_B"] + 1)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora_state_dict(module).items())
