"""Roles are read from structure, or registered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_lora import ConfigError, LoRAConfig, TargetNotFoundError, inject_lora, register_role
from lightning_lora.lora.targets.roles import hugging_face_models, module_roles
from tests.support.tiny_models import Net, gpt2, llama, llama_classifier


@pytest.mark.parametrize(("build", "head"), [(llama, "lm_head"), (gpt2, "lm_head"), (llama_classifier, "score")])
@pytest.mark.parametrize("tied", [False, True])
def test_heads_are_heads_tied_or_not(build: Callable[..., nn.Module], head: str, tied: bool) -> None:
    roles = module_roles(build(tie_word_embeddings=tied))
    assert [name for name, role in roles.items() if role == "head"] == [head]


def test_a_linear_that_shares_its_weight_with_an_embedding_is_a_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.body = nn.Linear(4, 4)
            self.out = nn.Linear(4, 10, bias=False)
            self.out.weight = self.table.weight

    assert module_roles(Tied()) == {"table": "embedding", "body": "other", "out": "head"}


def test_a_model_without_head_has_none() -> None:
    assert "head" not in module_roles(llama().model).values()


def test_a_model_inside_a_module_keeps_its_roles() -> None:
    outer = nn.ModuleDict({"net": llama(), "probe": nn.Linear(4, 4)})
    inner = module_roles(llama())
    assert module_roles(outer) == {f"net.{name}": role for name, role in inner.items()} | {"probe": "other"}
    assert [name for name, _ in hugging_face_models(outer)] == ["net"]
    assert [name for name, _ in hugging_face_models(outer["net"])] == [""]


def test_plain_modules_have_the_role_other() -> None:
    assert module_roles(Net()) == {"first": "other", "second": "other"}
    assert module_roles(nn.Linear(2, 2)) == {"": "other"}
    assert module_roles(nn.LayerNorm(2)) == {}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_torch_transformers_have_roles_by_structure() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2)
    roles = module_roles(decoder)
    assert roles["layers.0.linear1"] == roles["layers.1.linear2"] == "mlp"
    assert roles["layers.0.self_attn.out_proj"] == roles["layers.0.multihead_attn"] == "attention"


def test_a_block_with_attention_and_free_names_splits_into_attention_and_mlp() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("to_q", "to_k", "to_v", "to_out")})
            self.grow, self.shrink = nn.Linear(4, 8), nn.Linear(8, 4)

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()]), "readout": nn.Linear(4, 2)})
    roles = module_roles(model)
    assert {roles[f"blocks.1.mixing.{name}"] for name in ("to_q", "to_k", "to_v", "to_out")} == {"attention"}
    assert roles["blocks.0.grow"] == roles["blocks.1.shrink"] == "mlp"
    assert roles["readout"] == "other"


class Mixer(nn.Module):
    """A state-space mixer, recognised by ``A_log``."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(8, 4))
        self.conv1d = nn.Conv1d(8, 8, 4, groups=8)
        self.in_proj, self.dt_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.conv1d(self.in_proj(x).mT, self.conv1d.weight, self.conv1d.bias, groups=8)
        return self.dt_proj.weight @ x


def test_what_mixes_states_stands_where_attention_does() -> None:
    block = nn.ModuleDict({"mamba": Mixer(), "feed_forward": nn.Linear(8, 8)})
    assert module_roles(nn.ModuleList([block])) == {
        "0.mamba.conv1d": "filter",
        "0.mamba.in_proj": "attention",
        "0.mamba.dt_proj": "attention",
        "0.feed_forward": "mlp",
    }


def test_weights_that_are_read_without_a_call_are_refused() -> None:
    with pytest.warns(UserWarning, match=r"0\.dt_proj \(Mixer reads its weight without calling it\)"):
        report = inject_lora(nn.ModuleList([Mixer()]), LoRAConfig(rank=2))
    assert list(report.layers) == ["0.in_proj"]
    with pytest.raises(TargetNotFoundError, match=r"'0\.conv1d', which cannot be adapted: Mixer reads its weight"):
        inject_lora(nn.ModuleList([Mixer()]), LoRAConfig(rank=2, targets=["conv1d"]))


class LlamaStyleMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)


class RouterMLP(LlamaStyleMLP):
    pass


class MemoryAttentionMLP(LlamaStyleMLP):
    pass


class MaskedAttentionDecoderLayer(nn.Module):
    """A block with "attention" in its class name, which holds attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value")})
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)


def roles_of(modules: dict[str, nn.Module]) -> dict[str, set[str]]:
    """Name of each module in one block to the roles of the layers inside it."""
    block = nn.ModuleDict(modules)
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, role in module_roles(nn.ModuleDict({"block": block})).items():
        found[name.split(".")[1]].add(role)
    return found


def test_experts_and_routers_made_of_mlps_are_experts_and_routers() -> None:
    moe = {
        "experts": nn.ModuleList(LlamaStyleMLP() for _ in range(2)),
        "gate": nn.ModuleDict({"router_mlp": RouterMLP()}),
        "shared_expert": LlamaStyleMLP(),
    }
    roles = module_roles(nn.ModuleDict(moe))
    expected = {"experts": "experts", "gate": "router", "shared_expert": "mlp"}
    assert {name.partition(".")[0]: role for name, role in roles.items()} == expected
    assert len(roles) == 8


def test_an_mlp_is_one_wherever_it_stands() -> None:
    assert roles_of({"mixer": LlamaStyleMLP(), "a": MemoryAttentionMLP()}) == {"mixer": {"mlp"}, "a": {"mlp"}}


def test_a_block_named_after_its_attention_is_not_all_attention() -> None:
    roles = module_roles(nn.ModuleList([MaskedAttentionDecoderLayer()]))
    assert roles == {f"0.self_attn.{name}": "attention" for name in ("query", "key", "value")} | {
        "0.fc1": "mlp",
        "0.fc2": "mlp",
    }


def test_only_in_a_transformers_model_does_a_class_name_tell_an_embedding() -> None:
    class ImageEmbedding(Net):
        """A user's network with "embedding" in its name."""

    assert set(module_roles(ImageEmbedding()).values()) == {"other"}


def test_a_registered_role_comes_before_structure(registries: None) -> None:
    register_role("second", "head")
    register_role("*.q_proj", "router")
    assert module_roles(Net()) == {"first": "other", "second": "head"}
    model = llama()
    report = inject_lora(model, LoRAConfig(rank=2, targets="attention"))
    assert {name.rpartition(".")[2] for name in report.layers} == {"k_proj", "v_proj", "o_proj"}
    plain = Net()
    report = inject_lora(plain, LoRAConfig(rank=2))
    assert list(report.layers) == ["first"]
    assert report.skipped == {"second": "head, not targeted"}


def test_registered_roles_are_forgotten_after_the_test() -> None:
    assert module_roles(Net())["second"] == "other"


@pytest.mark.parametrize(
    ("pattern", "role", "words"),
    [("second", "brain", "role must be one of attention, mlp"), ("", "mlp", "non-empty name pattern")],
)
def test_a_bad_registration_is_refused(pattern: str, role: str, words: str, registries: None) -> None:
    with pytest.raises(ConfigError, match=words):
        register_role(pattern, role)


def test_a_role_nothing_has_is_refused_with_what_there_is() -> None:
    with pytest.raises(TargetNotFoundError, match=r"targets='attention' matches none of the 2 adaptable .* 2 other"):
        inject_lora(Net(), LoRAConfig(rank=2, targets="attention"))
    with pytest.raises(TargetNotFoundError, match="targets='attention' matches none"):
        inject_lora(nn.ModuleDict({"e": nn.Embedding(4, 4)}), LoRAConfig(targets="attention", adapt_embeddings=True))
