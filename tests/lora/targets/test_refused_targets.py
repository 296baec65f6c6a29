"""Settings that select nothing, or a layer that cannot be adapted, are refused and leave the module unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import OPTConfig, OPTForCausalLM

from lightning_lora import ConfigError, LoRAConfig, TargetNotFoundError, inject_lora
from lightning_lora.lora.layers import LoRALayer
from tests.support.tiny_models import gpt2, llama, llama_classifier, mlp, portrait


class TiedLinears(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(8, 8), nn.Linear(8, 8)
        self.back.weight = self.front.weight


def with_dtype(dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    return model


def sparse() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False)
    return model


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def weight_norm_lstm() -> nn.Module:
    return parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")


def hooked() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 4)))


def opt() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    tokens: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return OPTForCausalLM(OPTConfig(**sizes, **tokens, word_embed_proj_dim=32, max_position_embeddings=32))


class Refused(NamedTuple):
    name: str
    build: Callable[[], nn.Module]
    settings: dict[str, Any]
    error: type[Exception]
    words: tuple[str, ...]


REFUSED = [
    Refused(
        "B07 no target matches",
        llama,
        {"targets": ["q_prj"]},
        TargetNotFoundError,
        ("target 'q_prj' matches none of the 16 adaptable layers", "did you mean 'q_proj'"),
    ),
    Refused("B07 closest of many", llama, {"targets": ["*.proj"]}, TargetNotFoundError, ("did you mean", "_proj'")),
    Refused("B08 one of two", llama, {"targets": ["q_proj", "zzz"]}, TargetNotFoundError, ("target 'zzz'", "none")),
    Refused(
        "B09 regular expression",
        llama,
        {"targets": [".*(q|v)_proj$"]},
        TargetNotFoundError,
        ("matches none", "not regular expressions", "'*.mlp.*'"),
    ),
    Refused(
        "B11 a norm", llama, {"targets": ["input_layernorm"]}, TargetNotFoundError, ("LlamaRMSNorm", "no weight matrix")
    ),
    Refused("B11 a container", llama, {"targets": ["mlp"]}, TargetNotFoundError, ("LlamaMLP", "write '*.mlp.*'")),
    Refused("B11 a top container", llama, {"targets": ["model"]}, TargetNotFoundError, ("LlamaModel", "'model.*'")),
    Refused("B12 all excluded", mlp, {"exclude": ["*"]}, TargetNotFoundError, ("nothing is left", "first, second")),
    Refused("B12 exclude misses", llama, {"exclude": ["q_prj"]}, TargetNotFoundError, ("exclude 'q_prj'", "q_proj")),
    Refused("all trained in full", mlp, {"trainable": ["*"]}, TargetNotFoundError, ("nothing is left", "in full")),
    Refused(
        "B15 rank pattern misses",
        llama,
        {"rank_pattern": {"q_prj": 2}},
        TargetNotFoundError,
        ("rank_pattern 'q_prj' matches none of the 14 adapted layers", "q_proj"),
    ),
    Refused(
        "B15 rank pattern on a layer left alone",
        llama,
        {"targets": "mlp", "rank_pattern": {"q_proj": 2}},
        TargetNotFoundError,
        ("rank_pattern 'q_proj' matches none of the 6 adapted layers",),
    ),
    Refused("B15 alpha pattern misses", mlp, {"alpha_pattern": {"third": 2}}, TargetNotFoundError, ("'third'",)),
    Refused(
        "B03 rank pattern too large",
        mlp,
        {"rank_pattern": {"second": 9}},
        ConfigError,
        ("rank must be in [1, 8] for 'second', a (8, 32) weight, got rank=9",),
    ),
    Refused(
        "B16 nothing to adapt",
        lambda: nn.Sequential(nn.LayerNorm(4), nn.ReLU()),
        {},
        TargetNotFoundError,
        ("Sequential has no layer that can be adapted", "LayerNorm, ReLU"),
    ),
    Refused("a bilinear form", lambda: nn.Sequential(nn.Bilinear(4, 4, 4)), {}, TargetNotFoundError, ("low-rank",)),
    Refused("a bag of embeddings", lambda: nn.ModuleDict({"bag": nn.EmbeddingBag(5, 4), "b": nn.Linear(4, 4)}),
            {"targets": ["bag"]}, TargetNotFoundError, ("'bag'", "EmbeddingBag sums rows inside the lookup")),
    Refused("dropout on attention", lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), {"dropout": 0.1}, ConfigError,
            ("dropout=0.1 cannot act on 2", "0, 0.out_proj", "exclude")),
    Refused(
        "B20 tied head",
        lambda: llama(tie_word_embeddings=True),
        {"adapt_head": True},
        ConfigError,
        ("'lm_head' shares its weight with 'model.embed_tokens'", "exclude=['lm_head']", "untie"),
    ),
    Refused(
        "B20 tied embedding",
        gpt2,
        {"adapt_embeddings": True, "rank": 4},
        ConfigError,
        ("'transformer.wte' shares its weight with 'lm_head'",),
    ),
    Refused("B20 tied linears", TiedLinears, {}, ConfigError, ("'front' shares its weight with 'back'",)),
    Refused("B22 weight norm", parametrized, {}, TargetNotFoundError, ("0: its weight is computed", "parametrization")),
    Refused("B22 spectral norm", lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 2))), {},
            TargetNotFoundError, ("torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",)),
    Refused("B22 one weight of an LSTM", lambda: nn.Sequential(weight_norm_lstm()), {}, TargetNotFoundError,
            ("0: its weight_hh_l0 is computed", "remove_parametrizations(layer, 'weight_hh_l0')")),
    Refused("B22 pruned", pruned, {}, TargetNotFoundError, ("0: its weight is computed from other", "prune.remove")),
    Refused("B22 hooked", hooked, {}, TargetNotFoundError, ("0: its weight is computed", "remove_weight_norm")),
    Refused("B23 lazy", lambda: nn.Sequential(nn.LazyLinear(4)), {}, ConfigError, ("0.weight", "run one batch")),
    Refused("B23 one lazy among built", lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), {"targets": ["0"]},
            ConfigError, ("lazy", "1.weight", "run one batch")),
    Refused("B25 complex", lambda: with_dtype(torch.complex64), {"targets": ["0"]}, TargetNotFoundError,
            ("'0'", "torch.complex64, not floating point")),
    Refused("B25 int8", lambda: with_dtype(torch.int8), {"targets": ["0"]}, TargetNotFoundError, ("torch.int8",)),
    Refused("B25 float8", lambda: with_dtype(torch.float8_e4m3fn), {"targets": ["0"]}, TargetNotFoundError,
            ("torch.float8_e4m3fn",)),
    Refused("B25 sparse", sparse, {}, TargetNotFoundError, ("stored as torch.sparse_coo",)),
    Refused("B26 max_norm", lambda: nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), {"adapt_embeddings": True},
            TargetNotFoundError, ("max_norm rewrites",)),
    Refused("a table that looks up in its own way", opt, {"targets": ["embed_positions"]}, TargetNotFoundError,
            ("OPTLearnedPositionalEmbedding looks rows up in its own way",)),
    Refused("no head", lambda: llama().model, {"adapt_head": True}, TargetNotFoundError, ("adapt_head", "no head")),
    Refused("no embeddings", mlp, {"adapt_embeddings": True}, TargetNotFoundError, ("adapt_embeddings", "embedding")),
    Refused("trainable misses", llama_classifier, {"trainable": ["scores"]}, TargetNotFoundError,
            ("trainable 'scores'", "did you mean 'score'")),
    Refused("trainable without parameters", mlp, {"trainable": ["zzz"]}, TargetNotFoundError, ("no module with",)),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_refused_target_leaves_the_module_as_it_was(row: Refused) -> None:
    module = row.build()
    before = portrait(module)
    with pytest.raises(row.error) as error:
        inject_lora(module, LoRAConfig.from_dict({"rank": 2, **row.settings}))
    for word in row.words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"
    assert not any(isinstance(child, LoRALayer) for child in module.modules())
    assert portrait(module) == before


def test_the_five_closest_names_are_offered() -> None:
    with pytest.raises(TargetNotFoundError) as error:
        inject_lora(llama(), LoRAConfig(rank=2, targets=["prok"]))
    offered = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj") if repr(name) in str(error.value)]
    assert len(offered) >= 4


PASSED_OVER = [
    ("bilinear form", lambda: nn.ModuleDict({"a": nn.Bilinear(2, 3, 4), "b": nn.Linear(4, 4)}), "all", "a (a bilinear"),
    ("bag", lambda: nn.ModuleDict({"a": nn.EmbeddingBag(5, 4), "b": nn.Linear(4, 4)}), "all", "a (EmbeddingBag sums"),
    (
        "weight norm",
        lambda: nn.ModuleDict({"a": weight_norm_lstm(), "b": nn.Linear(4, 4)}),
        "all",
        "a (its weight_hh_l0",
    ),
    (
        "glob",
        lambda: nn.ModuleDict({"a": nn.ModuleDict({"bag": nn.EmbeddingBag(5, 4)}), "b": nn.Linear(4, 4)}),
        ["*"],
        "a.bag (EmbeddingBag",
    ),
    ("glob over types", lambda: with_dtype(torch.int8), ["*"], "0 (its weight is torch.int8"),
]


@pytest.mark.parametrize(("name", "build", "targets", "words"), PASSED_OVER, ids=[row[0] for row in PASSED_OVER])
def test_a_targeted_layer_is_never_passed_over_in_silence(
    name: str, build: Callable[[], nn.Module], targets: Any, words: str
) -> None:
    module = build()
    with pytest.warns(UserWarning, match="targeted layers cannot be adapted and stay frozen") as record:
        report = inject_lora(module, LoRAConfig(rank=2, targets=targets))
    assert words in str(record[0].message)
    assert len(report.layers) == 1
    assert any(words.startswith(skipped) for skipped in report.skipped)


def test_a_parametrized_convolution_is_named_once() -> None:
    module = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"^1 targeted layers cannot be adapted and stay frozen: 0 \(its weight"):
        inject_lora(module, LoRAConfig(rank=2))


def test_what_cannot_be_adapted_can_be_excluded_by_name() -> None:
    module = nn.ModuleDict({"bag": nn.EmbeddingBag(5, 4), "b": nn.Linear(4, 4)})
    report = inject_lora(module, LoRAConfig(rank=2, exclude=["bag"]))
    assert list(report.layers) == ["b"]


def test_layers_nobody_asked_for_bring_no_warning() -> None:
    module = nn.ModuleDict({"bag": nn.EmbeddingBag(5, 4), "b": nn.Linear(4, 4)})
    assert list(inject_lora(module, LoRAConfig(rank=2, targets=["b"])).layers) == ["b"]
    assert len(inject_lora(opt(), LoRAConfig(rank=2)).layers) == 6


def test_positional_tables_are_named_when_embeddings_are_asked_for() -> None:
    model = opt()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # pyright: ignore
    with pytest.warns(UserWarning, match=r"embed_positions \(OPTLearnedPositionalEmbedding looks"):
        report = inject_lora(model, LoRAConfig(rank=2, adapt_embeddings=True))
    assert [name for name, spec in report.layers.items() if spec.role == "embedding"] == ["model.decoder.embed_tokens"]
