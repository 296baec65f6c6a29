"""Fused experts: adapted per expert, by transformers' own computation, and exchanged with PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_lora import (
    AdapterFileError,
    LoRAConfig,
    count_parameters,
    inject_lora,
    load_adapter,
    lora_layers,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.files.adapter import peft_experts
from lightning_lora.files.merge.merged_model import save_merged
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.lora.layers.experts import LoRAExperts, LoRAFusedExperts
from tests.support.moe_models import BUILDERS, moe
from tests.support.tiny_models import logits, loss, portrait, state_bytes, wake

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT looks for the patterns of parameters among the modules (and finds them where it needs them).
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]


def adapted(name: str, **settings: Any) -> Any:
    model = moe(name)
    inject_lora(model, LoRAConfig(**{"rank": 4, **settings}))
    wake(model, size=0.1)
    return model


def experts(model: nn.Module) -> dict[str, LoRAFusedExperts]:
    return {name: layer for name, layer in lora_layers(model).items() if isinstance(layer, LoRAFusedExperts)}


@pytest.mark.parametrize("shared", [False, True], ids=["own factors", "shared factors"])
@pytest.mark.parametrize("name", BUILDERS)
def test_experts_start_as_the_base_take_effect_and_merge(name: str, shared: bool) -> None:
    model = moe(name)
    before, base = portrait(model), logits(model)
    inject_lora(model, LoRAConfig(rank=4, targets="experts", share_expert_factors=shared))
    assert experts(model).keys() == lora_layers(model).keys()
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-6)
    wake(model, size=0.2)
    changed, state = logits(model), state_bytes(model)
    assert (changed - base).abs().max() > 0.05
    merge_lora(model)
    torch.testing.assert_close(logits(model), changed, rtol=1e-5, atol=1e-5)
    unmerge_lora(model)
    assert state_bytes(model) == state
    remove_lora(model)
    model.requires_grad_(True)
    assert portrait(model) == before


@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_are_those_through_the_merged_experts(name: str) -> None:
    model = adapted(name, targets="experts").double()
    ours = torch.autograd.grad(loss(model), list(factor_parameters(model).values()))
    plain = moe(name).double()
    plain.set_experts_implementation("eager")
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" not in key})
    factors, weights = [], {}
    for path, layer in experts(model).items():
        for weight, spec in layer.lora_specs.items():
            A, B = (factor.detach().clone().requires_grad_() for factor in layer.lora_pair(weight))
            delta = spec.scale * B @ A
            factors += [A, B]
            weights[f"{path}.{weight}"] = plain.get_parameter(f"{path}.{weight}").detach() + (
                delta.mT if layer.transposed(layer) else delta
            )
    tokens = torch.arange(24).reshape(2, 12) * 7 % 64
    called = torch.func.functional_call(plain, weights, (tokens,), {"labels": tokens})
    for found, expected in zip(ours, torch.autograd.grad(called.loss, factors), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_base_computes_by_the_implementation_of_its_config(implementation: str) -> None:
    model = moe("qwen3_moe")
    base = logits(model)
    model.set_experts_implementation(implementation)
    inject_lora(model, LoRAConfig(rank=4))
    torch.testing.assert_close(logits(model), base, rtol=1e-5, atol=1e-5)


def test_the_rank_of_an_expert_is_shared_among_the_active_ones() -> None:
    report = inject_lora(moe("qwen3_moe"), LoRAConfig(rank=8))
    ranks = {spec.role: spec.rank for spec in report.layers.values()}
    assert ranks == {"attention": 8, "experts": 4}
    few = inject_lora(moe("qwen3_moe", num_experts_per_tok=3), LoRAConfig(rank=2))
    assert {spec.rank for spec in few.layers.values() if spec.role == "experts"} == {1}


def test_experts_that_share_a_factor_have_the_whole_rank() -> None:
    model = moe("mixtral")
    inject_lora(model, LoRAConfig(rank=4, targets="experts", share_expert_factors=True))
    layer = next(iter(experts(model).values()))
    shapes = {name: tuple(factor.shape) for name, factor in layer.lora_factors().items()}
    assert shapes == {
        "gate_up_proj_lora_A": (1, 4, 32),
        "gate_up_proj_lora_B": (4, 48, 4),
        "down_proj_lora_A": (4, 4, 24),
        "down_proj_lora_B": (1, 32, 4),
    }
    assert count_parameters(model).by_role == {"experts": 2 * (4 * 32 + 4 * 48 * 4 + 4 * 4 * 24 + 32 * 4)}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Mixture(nn.Module):
    """Experts in a list, as users write them."""

    def __init__(self, **numbers: int) -> None:
        super().__init__()
        self.__dict__.update(numbers)
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return torch.stack([expert(x) for expert in self.experts], -1) @ weights[..., None].squeeze(-1)


def test_experts_in_a_list_share_the_rank_too_and_the_router_stays_frozen() -> None:
    model = Mixture(top_k=2)
    report = inject_lora(model, LoRAConfig(rank=6))
    assert {name: spec.rank for name, spec in report.layers.items()} == {
        f"experts.{expert}.{layer}": 3 for expert in range(3) for layer in ("up", "down")
    }
    assert report.skipped == {"gate": "router, not targeted"}


def test_where_nothing_says_how_many_are_active_a_warning_says_so() -> None:
    with pytest.warns(UserWarning, match=r"nothing in Mixture says how many experts are active"):
        report = inject_lora(Mixture(), LoRAConfig(rank=6))
    assert {spec.rank for spec in report.layers.values()} == {6}


def test_one_weight_of_the_experts_can_be_named() -> None:
    model = moe("mixtral")
    report = inject_lora(model, LoRAConfig(rank=4, targets=["down_proj"], rank_pattern={"*.layers.0.*": 3}))
    assert [list(layer.lora_specs) for layer in experts(model).values()] == [["down_proj"]] * 2
    assert [spec.rank for spec in report.layers.values()] == [3, 2]
    wake(model, size=0.2)
    changed = logits(model)
    merge_lora(model)
    torch.testing.assert_close(logits(model), changed, rtol=1e-5, atol=1e-5)


def test_one_weight_of_the_experts_can_be_excluded() -> None:
    model = moe("mixtral")
    report = inject_lora(model, LoRAConfig(rank=4, targets="experts", exclude=["gate_up_proj"]))
    assert [list(layer.lora_specs) for layer in experts(model).values()] == [["down_proj"]] * 2
    assert report.skipped["model.layers.0.mlp.experts.gate_up_proj"] == "excluded"


def test_experts_with_a_computation_of_their_own_are_refused_by_name() -> None:
    class OwnExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8, 8))
            self.top_k = 2

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ti,eoi->to", x, self.weight)

    model = nn.ModuleDict({"experts": OwnExperts(), "mlp": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match=r"experts \(OwnExperts holds 4 fused weights"):
        report = inject_lora(model, LoRAConfig(rank=2))
    assert list(report.layers) == ["mlp"]


def test_dropout_drops_inputs_of_the_update_in_training_only() -> None:
    model = adapted("mixtral", targets="experts", dropout=0.5)
    still = logits(model)
    assert torch.equal(logits(model), still)
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_copies_are_independent() -> None:
    model = adapted("gpt_oss")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    wake(twin, seed=5, size=0.2)
    assert not torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("settings", [{}, {"share_expert_factors": True}, {"targets": ["down_proj"]}], ids=str)
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


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_merged_mixture_loads_in_transformers(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    save_merged(model, tmp_path / "merged")
    merged, wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), logits(model)
    assert (logits(merged) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


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
    found = peft_experts.unstack_by_model({"experts": file}, settings, "experts", module, LoRAExperts)
    update = found["experts.gate_up_proj_lora_B"] @ found["experts.gate_up_proj_lora_A"]
    torch.testing.assert_close(update.mT if LoRAExperts.transposed(module) else update, stored)
