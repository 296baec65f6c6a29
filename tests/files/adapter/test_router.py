"""An adapted router, and any other module that holds a matrix of its own, lives as every adapted layer does."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    TargetNotFoundError,
    disable_lora,
    inject_lora,
    load_adapter,
    lora_layers,
    remove_lora,
    save_adapter,
)
from lightning_lora.lora.layers.matrices import LoRAMatrices
from tests.oracle.peft_models import peft_warnings
from tests.support.moe_models import moe
from tests.support.tiny_models import TOKENS, logits, portrait

pytestmark = [
    *peft_warnings,
    pytest.mark.filterwarnings("ignore:.*has no lightning_lora.json:UserWarning"),
    # PEFT compares patterns with names of modules, and says so of patterns that it does use for parameters.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of PEFT with adapters of routers alone."""
    path = tmp_path_factory.mktemp("router")
    settings: dict[str, Any] = {"target_parameters": ["gate.weight"], "rank_pattern": {"1.mlp.gate.weight": 3}}
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(moe("mixtral"), config).save_pretrained(str(path))
    return path


def loaded(folder: Path) -> Any:
    model = moe("mixtral")
    load_adapter(model, folder)
    return model


def test_a_router_alone_goes_to_peft_and_back(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    assert {name: layer.lora_spec.rank for name, layer in lora_layers(model).items()} == {
        "model.layers.0.mlp.gate": 2,
        "model.layers.1.mlp.gate": 3,
    }
    assert {layer.lora_spec.role for layer in lora_layers(model).values()} == {"router"}
    save_adapter(model, tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model))
    theirs = peft.PeftModel.from_pretrained(moe("mixtral"), str(tmp_path / "again"))
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-6
    assert (logits(moe("mixtral")) - logits(model)).abs().max() > 1e-4


def test_its_adapter_trains_switches_off_and_comes_off(folder: Path) -> None:
    model, base = loaded(folder), moe("mixtral")
    before = portrait(base)
    model(TOKENS, labels=TOKENS).loss.backward()
    for layer in lora_layers(model).values():
        assert isinstance(layer, LoRAMatrices)
        assert all(factor.grad is not None and bool(factor.grad.any()) for factor in layer.lora_factors().values())
        assert layer.weight.grad is None
    with disable_lora(model):
        assert torch.equal(logits(model), logits(base))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), logits(model))
    remove_lora(model)
    assert torch.equal(logits(model), logits(base))
    assert {name: type(child) for name, child in model.named_modules()} == before["classes"]


def test_no_target_selects_a_matrix_whose_use_is_unknown() -> None:
    with pytest.raises(TargetNotFoundError):
        inject_lora(moe("mixtral"), LoRAConfig(targets=["gate"]))
    assert not any("gate" in name.rpartition(".")[2] for name in inject_lora(moe("mixtral"), LoRAConfig(rank=2)).layers)


class Pair(nn.Module):
    """Two matrices of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.one) @ self.two


def around_pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), Pair())


def test_one_of_two_matrices_is_saved_in_a_form_that_peft_refuses(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_parameters=["1.two"], init_lora_weights=False)
    peft.get_peft_model(around_pair(), config).save_pretrained(str(tmp_path / "theirs"))  # pyright: ignore
    model, again, x = around_pair(), around_pair(), torch.randn(3, 6)
    load_adapter(model, tmp_path / "theirs")
    assert list(lora_layers(model)["1"].lora_factors()) == ["two_lora_A", "two_lora_B"]
    with pytest.warns(UserWarning, match=r"PEFT cannot load this adapter.*1\.two \(one of several matrices of Pair"):
        save_adapter(model, tmp_path / "ours")
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="not supported"):
        peft.PeftModel.from_pretrained(around_pair(), str(tmp_path / "ours"))  # pyright: ignore
