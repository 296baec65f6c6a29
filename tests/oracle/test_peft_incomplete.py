"""PEFT's folders whose tensors are not those that their config speaks of are refused, and nothing is changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import AdapterFileError, load_adapter, lora_layers
from lightning_lora.files.adapter.peft_format import CONFIG_FILE, PREFIX, TENSOR_FILE
from tests.oracle.peft_models import peft_warnings, without_manifest
from tests.support.moe_models import moe
from tests.support.tiny_models import llama, llama_classifier, portrait

pytestmark = peft_warnings

Q = {"target_modules": ["q_proj"]}
MOE = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
SCORE = {"target_modules": ["q_proj"], "modules_to_save": ["score"]}

# Builder, settings, the tensors that are taken out or whose settings are changed, what the message says.
LOST: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str, dict[str, Any], str]] = {
    "of a layer chosen by number": (
        llama,
        Q | {"layers_to_transform": [0, 1]},
        "layers.1.self_attn",
        {},
        r"targets 1 layers that its tensors leave out \(model\.layers\.1\.self_attn\.q_proj\)",
    ),
    "of a layer chosen by expression": (
        llama,
        {"target_modules": r".*\.(q|k)_proj"},
        "layers.0.self_attn.k_proj",
        {},
        r"targets 1 layers .*layers\.0\.self_attn\.k_proj",
    ),
    "of the experts of a layer": (
        lambda: moe("gpt_oss"),
        MOE,
        "layers.1.mlp.experts.",
        {},
        r"targets model\.layers\.1\.mlp\.experts\.gate_up_proj, but has no tensors",
    ),
    "of one weight of the experts": (
        lambda: moe("gpt_oss"),
        MOE,
        "layers.1.mlp.experts.base_layer.",
        {},
        r"targets model\.layers\.1\.mlp\.experts\.gate_up_proj, but has no tensors",
    ),
    "of a router": (
        lambda: moe("qwen3_moe"),
        {"target_parameters": ["gate.weight"]},
        "layers.0.mlp.gate",
        {},
        r"targets model\.layers\.0\.mlp\.gate\.weight, but has no tensors",
    ),
    "of a module trained in full": (
        llama_classifier,
        SCORE,
        "score",
        {},
        r"modules_to_save, but its tensors leave out 1 of their parameters \(score\.weight\)",
    ),
    "of one of two modules trained in full": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
        "model.norm",
        {},
        r"leave out 1 of their parameters \(model\.norm\.weight\)",
    ),
    "that the config does not target": (
        llama,
        Q,
        "",
        {"target_modules": ["k_proj"]},
        r"tensors of 2 layers that its config does not adapt: model\.layers\.0\.self_attn\.q_proj",
    ),
    "that the config leaves out by number": (
        llama,
        Q,
        "",
        {"layers_to_transform": [1]},
        r"tensors of 1 layers that its config does not adapt: model\.layers\.0\.self_attn\.q_proj",
    ),
    "that the config excludes": (
        llama,
        Q,
        "",
        {"exclude_modules": ["layers.1.self_attn.q_proj"]},
        r"tensors of 1 layers that its config does not adapt: model\.layers\.1\.self_attn\.q_proj",
    ),
    "that no targeted parameter explains": (
        lambda: moe("gpt_oss"),
        MOE,
        "",
        {"target_parameters": ["experts.down_proj"]},
        r"tensors of model\.layers\.0\.mlp\.experts\.base_layer.* belong to no layer",
    ),
}


@pytest.mark.parametrize("ready", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("row", LOST)
def test_missing_and_surplus_tensors_are_named(row: str, ready: bool, tmp_path: Path) -> None:
    build, settings, taken, change, words = LOST[row]
    peft.get_peft_model(build(), peft.LoraConfig(r=2, **settings)).save_pretrained(str(tmp_path / "a"))  # pyright: ignore
    model = build()
    if ready:
        with without_manifest():
            load_adapter(model, tmp_path / "a")
    file, config = tmp_path / "a" / TENSOR_FILE, tmp_path / "a" / CONFIG_FILE
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not taken or taken not in name}
    assert taken == "" or len(kept) < len(tensors)
    save_file(kept, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    before = portrait(model)
    with pytest.raises(AdapterFileError, match=words):
        load_adapter(model, tmp_path / "a")
    assert portrait(model) == before


class Gate(nn.Module):
    """A matrix of its own, which the module around it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))


class Reads(nn.Module):
    """Computes with the matrix of a child, which it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.gate.weight.T


def test_a_matrix_that_is_read_without_a_call_is_refused(tmp_path: Path) -> None:
    """PEFT trains nothing there."""
    x = torch.randn(3, 6)
    theirs = peft.get_peft_model(
        Reads(), peft.LoraConfig(r=2, target_parameters=["gate.weight"], init_lora_weights=False)
    )  # pyright: ignore
    assert not theirs(x).requires_grad
    theirs.save_pretrained(str(tmp_path))
    model = Reads()
    with pytest.raises(AdapterFileError, match="gate cannot be adapted: Reads reads its weight without calling it"):
        load_adapter(model, tmp_path)
    assert not lora_layers(model)


def test_several_adapters_are_read_from_their_own_folders(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="one")
    theirs.add_adapter("two", peft.LoraConfig(r=3, target_modules=["v_proj"]))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match=r"is not an adapter, but holds some: give one of one, two in it"):
        load_adapter(llama(), tmp_path)
    for name, rank, leaf in (("one", 2, "q_proj"), ("two", 3, "v_proj")):
        model = llama()
        with without_manifest():
            load_adapter(model, tmp_path / name)
        assert {(layer.lora_spec.rank, key.rpartition(".")[2]) for key, layer in lora_layers(model).items()} == {
            (rank, leaf)
        }


def test_a_config_that_leaves_the_choice_to_the_model_is_taken_by_its_tensors(tmp_path: Path) -> None:
    peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules="all-linear")).save_pretrained(str(tmp_path))  # pyright: ignore
    config = tmp_path / CONFIG_FILE
    for choice in ("all-linear", None):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": choice}))
        model = llama()
        with without_manifest():
            load_adapter(model, tmp_path)
        names = {re.sub(r"\.lora_.*", "", name).removeprefix(PREFIX) for name in load_file(tmp_path / TENSOR_FILE)}
        assert lora_layers(model).keys() == names
