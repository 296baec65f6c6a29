"""An adapter that is saved and loaded is what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    inject_lora,
    load_adapter,
    lora_layers,
    save_adapter,
)
from lightning_lora.files.adapter.folder import read_adapter_folder
from lightning_lora.files.adapter.peft_format import TENSOR_FILE
from tests.support.adapter_files import adapted
from tests.support.tiny_models import gpt2, llama, llama_classifier, logits, mlp, portrait, wake
from tests.support.toys import tree


@pytest.mark.parametrize("build", [llama, gpt2, mlp, llama_classifier])
@pytest.mark.parametrize("settings", [{}, {"scaling": "rslora"}, {"alpha": 7.5, "dropout": 0.1, "lr_multiplier": 3.0}])
def test_an_adapter_comes_back_as_it_was(build: Callable[..., Any], settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(build, **settings)
    save_adapter(model, tmp_path / "adapter")
    fresh, ready = build(), build()
    inject_lora(ready, LoRAConfig.from_dict({"rank": 4, **settings}))
    for target in (fresh, ready):
        load_adapter(target, tmp_path / "adapter")
        assert portrait(target)["state"] == portrait(model)["state"]
        assert portrait(target)["classes"] == portrait(model)["classes"]
        assert portrait(target)["trains"] == portrait(model)["trains"]
        for name, layer in lora_layers(target).items():
            assert layer.lora_spec == lora_layers(model)[name].lora_spec


def test_patterns_come_back(tmp_path: Path) -> None:
    ranks, alphas = {"layers.0.mlp.up_proj": 2, "up_proj": 8}, {"down_proj": 5.5, "*.layers.1.*": 48.0}
    model = adapted(targets="mlp", rank_pattern=ranks, alpha_pattern=alphas)
    save_adapter(model, tmp_path / "adapter")
    again = llama()
    load_adapter(again, tmp_path / "adapter")
    found = {name: (layer.lora_spec.rank, layer.lora_spec.alpha) for name, layer in lora_layers(again).items()}
    assert found == {name: (layer.lora_spec.rank, layer.lora_spec.alpha) for name, layer in lora_layers(model).items()}
    assert found["model.layers.0.mlp.up_proj"] == (2, 32.0)
    assert torch.equal(logits(again), logits(model))


class WithNorm(nn.Module):
    """A trained part with buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 6)
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def test_modules_trained_in_full_come_back_with_their_buffers(tmp_path: Path) -> None:
    model = WithNorm()
    inject_lora(model, LoRAConfig(rank=2, trainable=["head"]))
    wake(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    save_adapter(model, tmp_path / "adapter")
    again = WithNorm()
    load_adapter(again, tmp_path / "adapter")
    x = torch.randn(4, 6)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert portrait(again)["trains"] == portrait(model)["trains"]
    assert not any(
        "base" in name for name in load_file(tmp_path / "adapter" / TENSOR_FILE) if name.endswith("body.weight")
    )


def test_a_part_trained_in_full_is_saved_from_a_frozen_module_too(tmp_path: Path) -> None:
    model = WithNorm()
    inject_lora(model, LoRAConfig(rank=2, trainable=["head"]))
    first = tree(save_adapter(model, tmp_path / "first"))
    model.requires_grad_(False)
    assert tree(save_adapter(model, tmp_path / "second")) == first


class Task(LightningModule):
    """A user's module around a model, with a part of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.net = llama(**settings)
        self.probe = nn.Linear(64, 2)


def test_names_are_those_of_the_model_inside(tmp_path: Path) -> None:
    task = Task()
    inject_lora(task, LoRAConfig(rank=4, exclude=["probe"]))
    wake(task)
    save_adapter(task, tmp_path / "adapter")
    assert set(read_adapter_folder(tmp_path / "adapter").ranks) == set(lora_layers(adapted()))
    for target in (Task(), llama()):
        load_adapter(target, tmp_path / "adapter")
        net = target.net if isinstance(target, Task) else target
        assert torch.equal(logits(net), logits(task.net))
        assert not any(p.requires_grad for n, p in target.named_parameters() if "lora_" not in n)


def test_a_part_trained_outside_the_model_is_saved_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task, again = Task(), Task()
    inject_lora(task, LoRAConfig(rank=4, trainable=["probe"]))
    wake(task)
    save_adapter(task, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.probe.weight, task.probe.weight)
    assert torch.equal(logits(again.net), logits(task.net))


def test_the_adapted_one_of_two_models_is_loaded(tmp_path: Path) -> None:
    both = nn.ModuleDict({"reference": llama(), "policy": adapted()})
    save_adapter(both, tmp_path / "adapter")
    target = nn.ModuleDict({"reference": llama(), "policy": llama()})
    inject_lora(target["policy"], LoRAConfig(rank=4))
    load_adapter(target, tmp_path / "adapter")
    assert not lora_layers(target["reference"])
    assert torch.equal(logits(target["policy"]), logits(both["policy"]))


def test_compiled_modules_save_and_load_under_plain_names(tmp_path: Path) -> None:
    model = adapted(mlp)
    compiled = torch.compile(model, backend="eager")
    assert tree(save_adapter(compiled, tmp_path / "a")) == tree(save_adapter(model, tmp_path / "b"))  # pyright: ignore
    again = torch.compile(mlp(), backend="eager")
    load_adapter(again, tmp_path / "a")  # pyright: ignore
    x = torch.randn(3, 16)
    # Compiled, the layers compute by the formula; eager, by one fused function.
    torch.testing.assert_close(again(x), model(x))
