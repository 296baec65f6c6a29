"""PEFT's folders with unsupported features or damaged settings are refused, and the message says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file, save_file
from transformers import WavLMConfig, WavLMModel

from lightning_lora import AdapterFileError, BaseMismatchError, load_adapter, lora_layers
from lightning_lora.files.adapter.peft_format import PREFIX
from tests.oracle.peft_models import ALL_LINEAR, peft_warnings, without_manifest, wrapped
from tests.support.tiny_models import llama, portrait

pytestmark = peft_warnings

UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "bias of the update": ({"lora_bias": True}, "lora_bias=True"),
    "all biases": ({"bias": "all"}, "bias='all'"),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
}


@pytest.mark.parametrize("feature", UNSUPPORTED)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:.*have invalid shape.*lora_B.bias")
def test_an_unsupported_feature_is_refused_by_name(feature: str, tmp_path: Path) -> None:
    settings, words = UNSUPPORTED[feature]
    wrapped(llama(), **{"target_modules": ["q_proj"]} | settings).save_pretrained(str(tmp_path / "adapter"))
    model = llama()
    before = portrait(model)
    with pytest.raises(AdapterFileError, match="which is not supported") as error:
        load_adapter(model, tmp_path / "adapter")
    assert words in str(error.value)
    assert portrait(model) == before


def test_an_adapter_of_layers_that_are_never_called_is_refused(tmp_path: Path) -> None:
    """PEFT adapts WavLM's projections, whose weights its attention reads: the adapter has no effect there."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    sizes |= {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    sizes |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    theirs = peft.get_peft_model(WavLMModel(WavLMConfig(**sizes)), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = WavLMModel(WavLMConfig(**sizes))
    with pytest.raises(AdapterFileError, match=r"q_proj cannot be adapted: WavLMAttention reads its weight"):
        load_adapter(ours, tmp_path / "adapter")
    assert not lora_layers(ours)


def test_another_method_is_refused(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    peft.get_peft_model(llama(), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(AdapterFileError, match=r"of type 'IA3'; only LORA"):
        load_adapter(llama(), tmp_path / "adapter")


def their_folder(tmp_path: Path, **settings: Any) -> Path:
    wrapped(llama(), **{"target_modules": ALL_LINEAR} | settings).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_a_layer_missing_from_pefts_file_is_refused(tmp_path: Path) -> None:
    folder = their_folder(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    model = llama()
    before = portrait(model)
    with pytest.raises(AdapterFileError, match=r"targets 1 layers .*\(model\.layers\.1\.mlp\.up_proj\)"):
        load_adapter(model, folder)
    assert portrait(model) == before


def test_layers_left_out_on_purpose_are_no_loss(tmp_path: Path) -> None:
    folder = their_folder(tmp_path, layers_to_transform=[0])
    model = llama()
    with without_manifest():
        load_adapter(model, folder)
    assert len(lora_layers(model)) == 7
    folder = their_folder(tmp_path / "2", exclude_modules=["layers.1.mlp.up_proj"])
    model = llama()
    with without_manifest():
        load_adapter(model, folder)
    assert len(lora_layers(model)) == 13


def test_a_retrained_copy_of_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = their_folder(tmp_path, target_modules=["q_proj", "embed_tokens"])
    name = f"{PREFIX}model.embed_tokens.base_layer.weight"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert name in tensors, "PEFT no longer saves the base embedding"
    save_file(tensors | {name: tensors[name] + 1}, folder / "adapter_model.safetensors")
    with pytest.raises(BaseMismatchError, match=r"holds a copy of model\.embed_tokens\.weight"):
        load_adapter(llama(), folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 8}, "disagree about the rank"),
        ({"r": "4"}, "r must be int, got '4'"),
        ({"rank_pattern": {"q_proj": 2}}, "disagree about the rank"),
        ({"rank_pattern": {"(q_proj": 4}}, "cannot be used"),
        ({"alpha_pattern": {"(a+)+$|(.*)*x": 4}}, "a regular expression that has not ended after 1 s"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be dict"),
        ({"lora_alpha": "x"}, "lora_alpha must be int or float"),
        ({"lora_alpha": -1}, "alpha must be greater than 0"),
        ({"lora_alpha": None}, "cannot be used"),
        ({"lora_dropout": 2}, "dropout"),
        ({"peft_type": None}, "only LORA"),
        ({"target_modules": 5}, "target_modules must be str or list"),
        ({"use_rslora": "no"}, "use_rslora must be bool, got 'no'"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be text"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"target_parameters": 5}, "cannot be used"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "cannot be used"),
    ],
)
def test_damaged_settings_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = their_folder(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    model = llama()
    before = portrait(model)
    with pytest.raises(AdapterFileError, match=words):
        load_adapter(model, folder)
    assert portrait(model) == before
