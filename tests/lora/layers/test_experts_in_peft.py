"""Adapters of fused experts, exchanged with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lightning_lora import (
    AdapterFileError,
    load_adapter,
    lora_state_dict,
    save_adapter,
)
from lightning_lora.files.adapter import peft_experts
from lightning_lora.lora.layers.experts import LoRAExperts
from tests.support.moe_models import BUILDERS, adapted, moe
from tests.support.tiny_models import logits, portrait

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT looks for the patterns of parameters among the modules (and finds them where it needs them).
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]


@pytest.mark.parametrize(
    "settings", [{}, {"share_expert_factors": True}, {"targets": ["down_proj"], "exclude": ["gate_up_proj"]}], ids=str
)
@pytest.mark.parametrize("name", BUILDERS)
def test_adapters_of_experts_load_here_and_in_peft(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(name, dropout=0.1, **settings)
    save_adapter(model, tmp_path / "adapter")
    again = moe(name)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    state = lora_state_dict(again)
    assert all(torch.equal(state[key], tensor) for key, tensor in lora_state_dict(model).items())
    theirs = peft.PeftModel.from_pretrained(moe(name), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", BUILDERS)
def test_adapters_of_experts_that_peft_wrote_load_here(name: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        moe(name),
        peft.LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=["q_proj", "o_proj"] if name != "deepseek_v3" else ["q_a_proj", "o_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.down_proj": 2},
            init_lora_weights=False,
        ),
    ).eval()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = moe(name)
    with pytest.warns(UserWarning, match=r"has no lightning_lora\.json"):
        load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_linear_layer_that_peft_targets_as_a_parameter_loads_here(tmp_path: Path) -> None:
    targets: dict[str, Any] = {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}
    theirs = peft.get_peft_model(moe("mixtral"), peft.LoraConfig(r=4, init_lora_weights=False, **targets)).eval()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = moe("mixtral")
    with pytest.warns(UserWarning, match=r"has no lightning_lora\.json"):
        load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_experts_of_another_number_do_not_fit(tmp_path: Path) -> None:
    save_adapter(adapted("mixtral"), tmp_path / "adapter")
    other = moe("mixtral", num_local_experts=8)
    before = portrait(other)
    with pytest.raises(AdapterFileError, match=r"does not fit this module"):
        load_adapter(other, tmp_path / "adapter", allow_other_base=True)
    assert portrait(other) == before


# Axis of the parameter that A spans in files of each PEFT, by whether the layer is marked as stored transposed.
ORIENTATIONS = [
    ("0.18.1", "mixtral", "middle"),
    ("0.18.1", "gpt_oss", "middle"),
    ("0.19.0", "mixtral", "middle"),
    ("0.19.0", "gpt_oss", "last"),
    ("0.19.1", "mixtral", "last"),
    ("0.19.1", "gpt_oss", "middle"),
    ("0.21.2", "mixtral", "last"),
    ("0.21.2", "gpt_oss", "middle"),
]


@pytest.mark.parametrize(("version", "name", "axis"), ORIENTATIONS)
def test_where_shapes_do_not_tell_the_version_of_peft_does(version: str, name: str, axis: str) -> None:
    module: Any = moe(name, intermediate_size=16).get_submodule("model.layers.0.mlp.experts")
    num_experts, middle, last = module.gate_up_proj.shape
    assert middle == last, "inputs and outputs alike"
    delta = {"A": torch.randn(num_experts, 2, middle), "B": torch.randn(num_experts, middle, 2)}
    # PEFT's two matrices for an A over one axis and a B over the other.
    file = (
        delta["A"].reshape(-1, middle),
        delta["B"].permute(1, 2, 0).reshape(middle, -1),
    )
    stored = delta["B"] @ delta["A"] if axis == "last" else (delta["B"] @ delta["A"]).mT
    settings = {"target_parameters": ["experts.gate_up_proj"], "peft_version": version}
    unstacked = peft_experts.Unstacked()
    unstacked.add({"experts": file}, settings, "experts", module, LoRAExperts)
    found = unstacked.factors
    update = found["experts.gate_up_proj_lora_B"] @ found["experts.gate_up_proj_lora_A"]
    torch.testing.assert_close(update.mT if LoRAExperts.transposed(module) else update, stored)
