"""Adapters of the kinds that PEFT's own test tables hold, made by PEFT and compared here with its live model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tests.harness.peft_cases import PEFT_IS_WRONG, judged, main
from tests.harness.peft_tables import Row
from tests.support.moe_models import moe
from tests.support.tiny_models import gpt2, llama, llama_classifier


class Matrices(nn.Module):
    """Holds two matrices, and a third with another name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(10, 12)), nn.Parameter(torch.randn(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first) @ self.second


class Custom(nn.Module):
    """Layers whose smaller side is below PEFT's default rank of 8, and modules with parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(90, 10)
        self.conv = nn.Conv1d(10, 4, 1)
        self.turned = Conv1D(5, 10)
        self.small = nn.Linear(9, 3)
        self.matrices = Matrices()
        self.square = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table(x)
        y = self.small(torch.cat([self.turned(rows), self.conv(rows.mT).mT], dim=-1))
        return y.sum() + self.square(self.matrices(rows))


class Attention(nn.Module):
    """Attention whose width is below the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(10, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = (x.float() / 90).unsqueeze(1).expand(-1, 3, -1) * torch.arange(1.0, 4)[:, None]
        return self.mha(y, y, y)[0]


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        torch.manual_seed(0)
        return build()

    return built


def narrow_gpt2() -> GPT2LMHeadModel:
    """GPT-2 whose vocabulary is as large as its width, so that every shape is square but those of the MLP."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False))


LINEAR = {"target_parameters": ["q_proj.weight", "mlp.up_proj.weight"], "target_modules": ["v_proj"]}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "ranks above the smaller side": (seeded(Custom), {"target_modules": ["table", "conv", "turned", "small"]}),
    "ranks far above the smaller side": (seeded(Custom), {"target_modules": ["small"], "r": 64, "use_rslora": True}),
    "a matrix of a module of an unknown kind": (seeded(Custom), {"target_parameters": ["matrices.second"]}),
    "both matrices of a module of an unknown kind": (
        seeded(Custom),
        {
            "target_parameters": ["matrices.second", "matrices.first"],
            "rank_pattern": {"matrices.first": 3},
            "alpha_pattern": {"second": 2},
        },
    ),
    "weights that are stored transposed, as parameters": (
        seeded(Custom),
        {"target_parameters": ["table.weight", "turned.weight", "square.weight"]},
    ),
    "square weights that are stored transposed, as parameters": (
        narrow_gpt2,
        {"target_parameters": ["wte.weight", "attn.c_proj.weight", "lm_head.weight"], "target_modules": []},
    ),
    "patterns for parameters": (
        llama,
        LINEAR
        | {"alpha_pattern": {"q_proj.weight": 6}, "rank_pattern": {r".*\.1\.mlp\.up_proj\.weight": 3, "v_proj": 2}},
    ),
    "patterns that mean layers, not parameters": (
        llama,
        LINEAR | {"alpha_pattern": {"q_proj": 6}, "rank_pattern": {"up_proj": 3}},
    ),
    "layers by number": (llama, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "layers by number and pattern": (
        llama,
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["blocks", "layers"]},
    ),
    "names left out by expression": (
        llama,
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.1\.self_attn\..*", "use_rslora": True},
    ),
    "every linear layer": (llama, {"target_modules": "all-linear"}),
    "magnitudes": (llama, {"target_modules": ["q_proj", "up_proj", "embed_tokens"], "use_dora": True}),
    "magnitudes of layers that fan out": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj", "wpe"], "fan_in_fan_out": True, "use_dora": True, "use_rslora": True},
    ),
    "linear layers that fan out": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "square layers, of which the last does not fan out": (
        narrow_gpt2,
        {"target_modules": ["attn.c_proj", "lm_head"], "fan_in_fan_out": True},
    ),
    "a head trained in full": (llama_classifier, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    **{
        f"{name}, experts alone": (
            lambda name=name: moe(name),
            {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        )
        for name in ("mixtral", "qwen3_moe", "gpt_oss", "llama4")
    },
    "different experts alone": (
        lambda: moe("gpt_oss"),
        {"target_modules": None, "target_parameters": ["0.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj"]},
    ),
    "experts above their size": (lambda: moe("qwen3_moe"), {"target_parameters": ["down_proj"], "r": 40}),
    "router and experts": (
        lambda: moe("mixtral"),
        {"target_modules": ["q_proj"], "target_parameters": ["gate.weight", "experts.down_proj"]},
    ),
    "router alone": (
        lambda: moe("qwen3_moe"),
        {"target_parameters": ["mlp.gate.weight"], "alpha_pattern": {"1.mlp.gate.weight": 3}},
    ),
    "every linear layer of a mixture": (lambda: moe("qwen3_moe"), {"target_modules": "all-linear"}),
}

# PEFT asks transformers for a deprecated name, and some settings make it warn.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"),
]


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_merges_are_those_of_peft(case: str) -> None:
    build, settings = CASES[case]
    assert judged(Row(case, build, peft.LoraConfig, settings)) == ("equal", "")


def test_a_gradient_that_peft_does_not_compute_is_proven_by_its_own_outputs() -> None:
    row = Row("attention", seeded(Attention), peft.LoraConfig, {"target_modules": ["mha"], "r": 16})
    assert judged(row)[0] == PEFT_IS_WRONG


REFUSED: dict[str, tuple[Callable[[], nn.Module], type, dict[str, Any], str]] = {
    "another method": (seeded(Custom), peft.LoHaConfig, {"target_modules": ["small"]}, "of type 'LOHA'"),
    "groups": (
        seeded(lambda: nn.Sequential(nn.Unflatten(1, (10, 1)), nn.Conv1d(10, 10, 1, groups=5))),
        peft.LoraConfig,
        {"target_modules": ["1"], "r": 10},
        "groups=5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_refused_by_name(case: str) -> None:
    build, config, settings, words = REFUSED[case]
    outcome, message = judged(Row(case, build, config, settings))
    assert outcome == "refused by name"
    assert words in message


@pytest.mark.parametrize("given", [[], ["absent"]])
def test_without_a_checkout_the_script_says_so(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    assert "is no checkout of PEFT" in capsys.readouterr().out
