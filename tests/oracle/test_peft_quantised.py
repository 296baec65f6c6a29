"""PEFT as oracle on quantised transformers models: equal tensors give equal logits, gradients and merged models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from lightning_lora import (
    LoRAConfig,
    count_parameters,
    inject_lora,
    load_adapter,
    lora_layers,
    lora_state_dict,
    merge_lora,
    save_adapter,
)
from lightning_lora.files.merge.merged_model import save_merged
from tests.oracle.peft_models import without_manifest
from tests.support.quantised_models import difference, torchao
from tests.support.tiny_models import TOKENS, gpt2, llama, wake

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LOADING: dict[str, Any] = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-dq": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
}
CONFIG = LoRAConfig(rank=4, alpha=8)
UNQUANTISED = "torchao leaves transposed linears unquantised"
MODELS = {"llama": llama, "gpt2": lambda: gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / request.param
    MODELS[request.param]().save_pretrained(path)
    return path


def load(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A quantised model in training mode; in eval mode bitsandbytes rounds more."""
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=LOADING[kind](), dtype=dtype).train()


def load_adapted(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    model = load(folder, kind, dtype)
    inject_lora(model, CONFIG)
    wake(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def factor_gradients(model: Any) -> dict[str, Tensor]:
    model(TOKENS, labels=TOKENS).loss.backward()
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


@pytest.mark.parametrize("kind", LOADING)
def test_peft_computes_the_same_logits_and_gradients(kind: str, folder: Path, tmp_path: Path) -> None:
    ours = load_adapted(folder, kind)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path, is_trainable=True).train()
    assert difference(logits(theirs), logits(ours)) < 1e-5
    mine, others = factor_gradients(ours), factor_gradients(theirs)
    assert mine.keys() == others.keys() == lora_state_dict(ours).keys()
    for name, gradient in mine.items():
        assert gradient.any()
        assert difference(gradient, others[name]) < 1e-5, name


@pytest.mark.parametrize("kind", LOADING)
def test_an_adapter_of_pefts_is_loaded(kind: str, folder: Path, tmp_path: Path) -> None:
    if kind.startswith("torchao") and folder.name == "gpt2":
        pytest.skip(UNQUANTISED)
    targets = ["c_attn", "c_fc"] if folder.name == "gpt2" else ["q_proj", "down_proj"]
    theirs = peft.get_peft_model(load(folder, kind), peft.LoraConfig(r=4, target_modules=targets))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(str(tmp_path))
    ours = load(folder, kind)
    with without_manifest():
        load_adapter(ours, tmp_path)
    assert difference(logits(ours), logits(theirs.train())) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LOADING)
def test_the_merged_folder_loads_without_quantisation_and_is_the_merged_model(
    kind: str, dtype: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    if kind.startswith("torchao") and folder.name == "gpt2":
        pytest.skip(UNQUANTISED)
    model = load_adapted(folder, kind, dtype)
    before = logits(model)
    with pytest.warns(UserWarning, match="the merged model is not quantised"):
        save_merged(model, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert model.config.quantization_config is not None
    assert model.hf_quantizer is not None
    assert torch.equal(logits(model), before)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").train()
    with pytest.warns(UserWarning, match="merged layers are no longer quantised"):
        merge_lora(model)
    assert torch.equal(logits(plain), logits(model))
    # The same numbers, dequantised and summed: only their rounding differs.
    assert difference(logits(plain), before) < (1e-5 if dtype is torch.float32 else 0.03)


@pytest.mark.parametrize("kind", LOADING)
def test_parameters_count_as_transformers_counts_them(kind: str, folder: Path) -> None:
    model = load(folder, kind)
    count = count_parameters(model).total
    assert count == model.num_parameters() == MODELS[folder.name]().num_parameters()


def test_every_linear_of_the_blocks_is_adapted(folder: Path) -> None:
    adapted = load_adapted(folder, "nf4")
    assert len(lora_layers(adapted)) == (8 if folder.name == "gpt2" else 14)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(folder: Path) -> None:
    expected = factor_gradients(load_adapted(folder, "nf4"))
    model = load_adapted(folder, "nf4")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = factor_gradients(model)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
