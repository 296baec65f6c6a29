"""Experts by grouped products: operators of a step, one compiled graph, and rounding no worse than PEFT's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from benchmarks.launches import LaunchCounter
from lightning_lora import LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter
from lightning_lora.lora.functional import expert_rows
from tests.support.moe_models import moe
from tests.support.tiny_models import wake

HIDDEN, TOKENS = 64, 96

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]


@pytest.fixture
def grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are grouped, and nobody reads the rows of each."""
    monkeypatch.setattr(expert_rows, "grouping_pays", lambda x, weights: True)
    monkeypatch.delattr(expert_rows, "counts_of")


def block(dtype: torch.dtype, num_experts: int = 4, lora: dict[str, Any] | None = None) -> nn.Module:
    """Router and experts of a layer of Qwen3-MoE; frozen but for adapters of ``lora``."""
    model: Any = moe("qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=32, num_experts=num_experts)
    model.to(dtype).requires_grad_(False).train()
    if lora is not None:
        inject_lora(model, LoRAConfig(targets="experts", **lora))
        wake(model)
    return model.get_submodule("model.layers.0.mlp")


def step(block: nn.Module, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Output, and gradients of the input and all factors."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    y = block(x)
    needed = [x, *(parameter for parameter in block.parameters() if parameter.requires_grad)]
    return [y, *torch.autograd.grad(y, needed, torch.randn(y.shape, generator=generator).to(dtype))]


def operators(dtype: torch.dtype, num_experts: int, lora: dict[str, Any] | None) -> Counter[str]:
    layer = block(dtype, num_experts, lora)
    with LaunchCounter() as counter:
        step(layer, dtype)
    return counter.counts


@pytest.mark.usefixtures("grouping")
@pytest.mark.parametrize(
    ("dtype", "lora", "above"),
    [
        (torch.bfloat16, {"rank": 32}, 23),
        (torch.bfloat16, {"rank": 40}, 27),
        (torch.bfloat16, {"rank": 32, "share_expert_factors": True}, 23),
        (torch.bfloat16, {"rank": 32, "dropout": 0.1}, 39),
        (torch.float32, {"rank": 32}, 19),
    ],
    ids=["bfloat16", "padded rank", "shared factors", "dropout", "float32"],
)
def test_a_step_takes_as_many_operators_with_any_number_of_experts(
    dtype: torch.dtype, lora: dict[str, Any], above: int
) -> None:
    floors = [operators(dtype, num_experts, None) for num_experts in (4, 16, 64)]
    steps = [operators(dtype, num_experts, lora) for num_experts in (4, 16, 64)]
    assert {counts.total() for counts in floors} == {floors[0].total()}
    assert [counts.total() - floors[0].total() for counts in steps] == [above] * 3
    assert steps[1].total() <= 2 * floors[1].total()
    # The only numbers that are read are seeds of dropout, which torch draws on the CPU.
    assert steps[1]["_local_scalar_dense"] == steps[1]["randint"]
    assert not {"nonzero", "masked_select"} & steps[1].keys()


@pytest.mark.usefixtures("grouping")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"share_expert_factors": True}], ids=["own", "shared"])
def test_a_compiled_block_is_one_graph(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    torch.compiler.reset()
    eager = block(dtype, lora={"rank": 8, **settings})
    compiled: Any = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for found, expected in zip(step(compiled, dtype), step(eager, dtype), strict=True):
        assert (found - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()


@pytest.mark.parametrize("is_grouped", [False, True], ids=["looped", "grouped"])
def test_rounding_in_bfloat16_is_no_worse_than_that_of_peft(
    is_grouped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's default: factors in float32, the sum of weight and update in bfloat16."""
    monkeypatch.setattr(expert_rows, "grouping_pays", lambda x, weights: is_grouped)
    shape = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 1, "num_local_experts": 8}
    ours = moe("mixtral", **shape).bfloat16()
    inject_lora(ours, LoRAConfig(rank=32, targets="experts"))
    wake(ours, size=0.03)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        moe("mixtral", **shape).bfloat16(), str(tmp_path / "adapter"), is_trainable=True
    )
    right = moe("mixtral", **shape).bfloat16().double()
    load_adapter(right, tmp_path / "adapter")
    experts = ours.get_submodule("model.layers.0.mlp.experts"), right.get_submodule("model.layers.0.mlp.experts")
    wrapped = theirs.get_submodule("base_model.model.model.layers.0.mlp.experts")
    errors = [torch.zeros(6), torch.zeros(6)]
    for seed in range(4):
        made, wanted = (_expert_step(layer, seed, lora_layers(layer)[""].lora_factors().values()) for layer in experts)
        peft_made = _expert_step(wrapped, seed, _factors_of_peft(wrapped))
        peft_made[2:] = [_as_ours(d, wanted_d) for d, wanted_d in zip(peft_made[2:], wanted[2:], strict=True)]
        for total, found in zip(errors, (made, peft_made), strict=True):
            total += torch.tensor([float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)])
    assert (errors[0] <= 1.05 * errors[1]).all()


def _expert_step(experts: nn.Module, seed: int, factors: Iterable[Tensor]) -> list[Tensor]:
    """Output, and gradients of the input and of factors, in float64."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(p.dtype for p in experts.parameters() if not p.requires_grad)
    x = torch.randn(256, HIDDEN, generator=generator).bfloat16().to(dtype).requires_grad_()
    chosen = torch.randn(256, 8, generator=generator).topk(2).indices
    y = experts(x, chosen, torch.rand(256, 2, generator=generator).bfloat16().to(dtype))
    d_y = torch.randn(y.shape, generator=generator).bfloat16().to(dtype)
    return [t.detach().double() for t in (y, *torch.autograd.grad(y, [x, *factors], d_y))]


def _factors_of_peft(wrapped: Any) -> list[Tensor]:
    """A and B of the first weight, then of the second; PEFT wraps the experts once for each."""
    found: dict[str, list[Tensor]] = {}
    while hasattr(wrapped, "parameter_name"):
        found[wrapped.parameter_name] = [wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight]
        wrapped = wrapped.base_layer
    return found["gate_up_proj"] + found["down_proj"]


def _as_ours(factor: Tensor, ours: Tensor) -> Tensor:
    """A factor of PEFT, ``(rank * experts, in)`` or ``(out, rank * experts)``, in the shape of ours."""
    if factor.shape[-1] == ours.shape[-1]:
        return factor.reshape(ours.shape)
    return factor.reshape(len(factor), -1, len(ours)).permute(2, 0, 1)
