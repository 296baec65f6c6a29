"""Folders whose tensors have the names of a live PeftModel, and adapters for another kind of model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_lora import AdapterFileError, BaseMismatchError, LoRAConfig, inject_lora, load_adapter, save_adapter
from lightning_lora.files.merge.merge_files import merge_files
from tests.oracle.peft_models import peft_warnings, without_manifest
from tests.support.moe_models import moe
from tests.support.tiny_models import llama, llama_classifier, logits, wake

pytestmark = peft_warnings

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens"]}),
    "classifier": (llama_classifier, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "experts": (
        lambda: moe("qwen3_moe"),
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


def live(case: str, adapter: str = "default") -> tuple[Any, Any]:
    """A PeftModel with trained values, and the function that builds its base."""
    build, settings = CASES[case]
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, lora_alpha=3, **settings), adapter).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, build


def written(model: Any, folder: Path, state: dict[str, Tensor], adapter: str = "default") -> Path:
    """What someone gets who writes ``state`` beside PEFT's config."""
    model.save_pretrained(folder / "peft")
    saved = folder / "peft" if adapter == "default" else folder / "peft" / adapter
    shutil.copytree(saved, folder / "raw")
    save_file(
        {name: tensor.detach().clone() for name, tensor in state.items()}, folder / "raw/adapter_model.safetensors"
    )
    return folder / "raw"


@pytest.mark.parametrize("adapter", ["default", "weight"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "factors"])
@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_of_a_live_model_is_read(case: str, whole: bool, adapter: str, tmp_path: Path) -> None:
    model, build = live(case, adapter)
    state = {name: tensor for name, tensor in model.state_dict().items() if whole or "lora_" in name or adapter in name}
    again = build()
    with without_manifest():
        load_adapter(again, written(model, tmp_path, state, adapter))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_a_state_dict_of_a_live_model_merges_on_disk(tmp_path: Path) -> None:
    model, build = live("linear")
    build().save_pretrained(tmp_path / "base")
    merge_files(tmp_path / "base", written(model, tmp_path, model.state_dict()), tmp_path / "merged")
    merged = type(build()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)


def test_a_state_dict_of_two_adapters_is_refused_by_their_names(tmp_path: Path) -> None:
    model, build = live("linear")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterFileError, match=r"holds 2 adapters \(default, other\), and one can be loaded"):
        load_adapter(build(), written(model, tmp_path, model.state_dict()))


def test_a_file_without_factors_says_what_it_holds(tmp_path: Path) -> None:
    model, build = live("linear")
    state = {"base_model.model.model.norm.weight": torch.ones(32)}
    with pytest.raises(AdapterFileError, match=r"holds no adapter tensors.* only model.norm.weight"):
        load_adapter(build(), written(model, tmp_path, state))


@pytest.mark.parametrize("whose", ["ours", "peft"])
def test_an_adapter_of_a_classifier_is_refused_by_a_language_model(whose: str, tmp_path: Path) -> None:
    if whose == "peft":
        live("classifier")[0].save_pretrained(tmp_path / "adapter")
    else:
        ours = llama_classifier()
        inject_lora(ours, LoRAConfig(rank=2, trainable=["score"]))
        save_adapter(ours, tmp_path / "adapter")
    said = r"1 tensors of modules trained in full that LlamaForCausalLM does not have \(score\.weight\)"
    model = llama()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(AdapterFileError, match=said):
        load_adapter(model, tmp_path / "adapter")
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_a_base_with_another_head_is_refused_by_the_name_of_the_head(tmp_path: Path) -> None:
    ours = llama()
    inject_lora(ours, LoRAConfig(rank=2))
    save_adapter(ours, tmp_path / "adapter")
    other = llama_classifier()
    other.model.load_state_dict(llama().model.state_dict())
    with pytest.raises(BaseMismatchError, match=r"2 of 21 frozen parameters differ: .*score\.weight"):
        load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4"])
def test_experts_trained_in_full_merge_on_disk(name: str, tmp_path: Path) -> None:
    base, ours = moe(name), moe(name)
    base.save_pretrained(tmp_path / "base")
    inject_lora(ours, LoRAConfig(rank=2, targets="attention", trainable=["experts"]))
    wake(ours)
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            if parameter.requires_grad and "lora_" not in key:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_adapter(ours, tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged")
    trained = {key for key, parameter in ours.named_parameters() if parameter.requires_grad and "lora_" not in key}
    assert trained
    assert all(torch.equal(merged.get_parameter(key), ours.get_parameter(key)) for key in trained)
    torch.testing.assert_close(logits(merged), logits(ours), rtol=1e-5, atol=1e-5)
