"""Adapter folders exchanged with PEFT: models inside modules, heads trained in full, confusable names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter
from lightning_lora.files.adapter.peft_format import PREFIX
from tests.oracle.peft_models import peft_warnings, without_manifest
from tests.support.tiny_models import llama, llama_classifier, logits, wake

pytestmark = peft_warnings


def test_a_model_inside_a_lightning_module_is_written_for_peft(tmp_path: Path) -> None:
    class Task(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = llama()

    task = Task()
    inject_lora(task, LoRAConfig(rank=4))
    wake(task)
    save_adapter(task, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight" in names
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert (logits(theirs) - logits(task.net)).abs().max() <= 1e-6
    plain, other = llama(), Task()
    load_adapter(plain, tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits(plain), logits(task.net))
    assert torch.equal(logits(other.net), logits(task.net))


def test_a_trained_classifier_goes_to_peft_and_back(tmp_path: Path) -> None:
    ours = llama_classifier()
    inject_lora(ours, LoRAConfig(rank=4, trainable=["score"]))
    wake(ours)
    ours.score.weight.data.normal_()
    save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    theirs = peft.PeftModel.from_pretrained(llama_classifier(), tmp_path / "ours")
    assert (logits(theirs) - logits(ours)).abs().max() <= 1e-6
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = llama_classifier()
    with without_manifest():
        load_adapter(model, tmp_path / "theirs")
    assert (logits(model) - logits(ours)).abs().max() <= 1e-6
    assert model.score.weight.requires_grad
    assert not model.model.norm.weight.requires_grad


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_head_trained_in_full_goes_to_peft(tmp_path: Path) -> None:
    ours = llama(tie_word_embeddings=True)
    inject_lora(ours, LoRAConfig(rank=4, trainable=["embed_tokens"]))
    wake(ours)
    with torch.no_grad():
        ours.lm_head.weight += 0.01 * torch.randn_like(ours.lm_head.weight)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "adapter")
    assert (logits(theirs) - logits(ours)).abs().max() <= 1e-6
    model = llama(tie_word_embeddings=True)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), logits(ours))
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Nested(nn.Module):
    """Layers whose names are suffixes of each other, which PEFT's rules confuse."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"fc": nn.Linear(6, 6), "other": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["other"](torch.tanh(self.inner["fc"](torch.tanh(self.fc(x)))))


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ["*"], "exclude": ["inner.*"]},
        {"targets": ["*"], "rank_pattern": {"inner.fc": 2}, "rank": 4},
        {"targets": ["*"], "rank_pattern": {"*er.fc": 4}, "rank": 2, "alpha_pattern": {"inner.*": 3.0}},
    ],
)
def test_names_that_end_each_other_mean_the_same_to_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    # In float64: the outputs are large, and float32 rounds them by more than PEFT may differ.
    ours = Nested().double()
    base = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    inject_lora(ours, LoRAConfig.from_dict({"rank": 4, **settings}))
    wake(ours, size=0.5)
    save_adapter(ours, tmp_path / "adapter")
    plain, again = Nested().double(), Nested().double()
    plain.load_state_dict(base)
    again.load_state_dict(base)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")  # pyright: ignore[reportArgumentType]
    load_adapter(again, tmp_path / "adapter")
    x = torch.randn(3, 6, dtype=torch.float64)
    assert (theirs(x) - ours(x)).abs().max() <= 1e-12
    assert torch.equal(again(x), ours(x))
    assert lora_layers(again).keys() == lora_layers(ours).keys()


def test_an_adapter_beside_a_frozen_classifier_loads_in_peft(tmp_path: Path) -> None:
    ours = llama_classifier()
    inject_lora(ours, LoRAConfig(rank=4))
    wake(ours)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(llama_classifier(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-6)
