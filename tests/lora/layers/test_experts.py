"""Fused experts: adapted per expert, by transformers' own computation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_lora import (
    LoRAConfig,
    count_parameters,
    inject_lora,
    lora_layers,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lightning_lora.files.merge.merged_model import save_merged
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.lora.layers.experts import LoRAFusedExperts
from tests.support.moe_models import BUILDERS, adapted, moe
from tests.support.tiny_models import logits, loss, portrait, state_bytes, wake

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


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
    report = inject_lora(
        model, LoRAConfig(rank=4, targets=["down_proj"], exclude=["gate_up_proj"], rank_pattern={"*.layers.0.*": 3})
    )
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


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_merged_mixture_loads_in_transformers(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    save_merged(model, tmp_path / "merged")
    merged, wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), logits(model)
    assert (logits(merged) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
