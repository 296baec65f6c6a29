"""PEFT as oracle: equal tensors give equal losses, gradients, files and merged models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, WavLMConfig, WavLMModel

from lightning_lora import (
    AdapterFileError,
    BaseMismatchError,
    LoRAConfig,
    inject_lora,
    load_adapter,
    lora_layers,
    lora_state_dict,
    save_adapter,
)
from lightning_lora.files.adapter.peft_format import PREFIX
from lightning_lora.files.merge.merged_model import save_merged
from lightning_lora.lora.layers import LoRAEmbedding
from tests.support.tiny_models import gpt2, llama, llama_classifier, logits, loss, portrait, wake

pytestmark = [
    # PEFT asks transformers for a name of the past.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    # PEFT sets this itself for GPT-2, layer by layer, and says so each time.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


def without_manifest() -> Any:
    return pytest.warns(UserWarning, match=r"has no lightning_lora\.json")


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}

# Model, our settings, PEFT's.
PAIRS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], dict[str, Any]]] = {
    "all": (llama, {}, {"target_modules": ALL_LINEAR}),
    "all-linear": (llama, {}, {"target_modules": "all-linear"}),
    "attention": (llama, {"targets": "attention"}, {"target_modules": ALL_LINEAR[:4]}),
    "mlp": (llama, {"targets": "mlp"}, {"target_modules": ALL_LINEAR[4:]}),
    **{name: (llama, {"targets": [name]}, {"target_modules": [name]}) for name in ALL_LINEAR},
    "one layer": (
        llama,
        {"targets": ["model.layers.1.mlp.up_proj"]},
        {"target_modules": ["model.layers.1.mlp.up_proj"]},
    ),
    "head": (llama, {"targets": ["lm_head", "q_proj"]}, {"target_modules": ["lm_head", "q_proj"]}),
    "embeddings": (
        llama,
        {"targets": ["q_proj"], "adapt_embeddings": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ),
    "rslora": (llama, {"scaling": "rslora"}, {"target_modules": ALL_LINEAR, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "targets": "mlp",
            "rank_pattern": {"layers.0.mlp.up_proj": 2, "up_proj": 8},
            "alpha_pattern": {"down_proj": 5.0, "*.layers.1.*": 48.0},
        },
        {
            "target_modules": ALL_LINEAR[4:],
            "rank_pattern": {"layers.0.mlp.up_proj": 2, "up_proj": 8},
            "alpha_pattern": {"down_proj": 5.0, r"model\.layers\.1\..*": 48.0},
        },
    ),
    "gpt2": (gpt2, {}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2 embeddings": (
        lambda: gpt2(**UNTIED),
        {"adapt_embeddings": True},
        {"target_modules": ["c_attn", "c_proj", "c_fc", "wte", "wpe"]},
    ),
}
every_pair = pytest.mark.parametrize("pair", PAIRS)


def both(pair: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Our model and PEFT's with equal tensors."""
    build, ours_settings, theirs_settings = PAIRS[pair]
    ours = build()
    inject_lora(ours, LoRAConfig.from_dict({"rank": 4, **ours_settings}))
    wake(ours)
    theirs = wrapped(build(), **theirs_settings)
    factors = their_factors(theirs)
    state = lora_state_dict(ours)
    assert factors.keys() == state.keys()
    for name, tensor in state.items():
        factors[name].data.copy_(tensor)
    return ours, theirs


def wrapped(model: PreTrainedModel, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 32, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**defaults | settings)).eval()


def their_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's factors by our names."""
    found = {}
    for name, parameter in model.named_parameters():
        for theirs, ours in (("embedding_A", "A"), ("embedding_B", "B"), ("A", "A"), ("B", "B")):
            for ending in (f".lora_{theirs}.default.weight", f".lora_{theirs}.default"):
                if name.endswith(ending):
                    found[f"{name.removeprefix(PREFIX).removesuffix(ending)}.lora_{ours}"] = parameter
    return found


@every_pair
def test_loss_and_gradients_are_those_of_peft(pair: str) -> None:
    ours, theirs = both(pair)
    our_loss, their_loss = loss(ours), loss(theirs)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=0)
    our_loss.backward()
    their_loss.backward()
    factors = their_factors(theirs)
    for name, layer in lora_layers(ours).items():
        for factor in ("lora_A", "lora_B"):
            expected, found = factors[f"{name}.{factor}"].grad, getattr(layer, factor).grad
            assert expected is not None
            assert expected.abs().max() > 0
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_a_padding_token_gives_the_gradients_of_peft() -> None:
    ours, theirs = both("embeddings")
    tokens = torch.tensor([[0, 0, 5, 9, 11, 3], [7, 8, 9, 10, 11, 12]])
    for model in (ours, theirs):
        model(tokens, labels=tokens).loss.backward()
    name = "model.embed_tokens.lora_A"
    layer = lora_layers(ours)["model.embed_tokens"]
    torch.testing.assert_close(layer.lora_A.grad, their_factors(theirs)[name].grad, rtol=1e-5, atol=1e-9)


def test_a_fresh_adapter_has_the_distribution_of_peft() -> None:
    ours = llama(hidden_size=128, intermediate_size=256)
    theirs = wrapped(llama(hidden_size=128, intermediate_size=256), target_modules=ALL_LINEAR, r=32)
    inject_lora(ours, LoRAConfig(rank=32))
    for name, tensor in lora_state_dict(ours).items():
        expected = their_factors(theirs)[name]
        # The spread of a sample standard deviation of n uniform values is below sd / sqrt(n).
        band = 4 / tensor.numel() ** 0.5
        assert tensor.std().item() == pytest.approx(expected.std().item(), rel=2 * band)
        assert tensor.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.01)


# Files.


@every_pair
def test_our_folder_loads_in_peft_with_equal_logits(pair: str, tmp_path: Path) -> None:
    build = PAIRS[pair][0]
    ours, _ = both(pair)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert (logits(theirs) - logits(ours)).abs().max() <= 1e-6
    assert (logits(theirs) - logits(build())).abs().max() > 1e-3
    assert their_factors(theirs).keys() == lora_state_dict(ours).keys()
    assert not their_factors(theirs).popitem()[1].requires_grad


@every_pair
def test_pefts_folder_loads_here_with_equal_logits(pair: str, tmp_path: Path) -> None:
    build = PAIRS[pair][0]
    ours, theirs = both(pair)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    model = build()
    with without_manifest():
        load_adapter(model, tmp_path / "adapter")
    assert (logits(model) - logits(theirs)).abs().max() <= 1e-6
    assert {name: layer.lora_spec.scale for name, layer in lora_layers(model).items()} == {
        name: layer.lora_spec.scale for name, layer in lora_layers(ours).items()
    }
    save_adapter(model, tmp_path / "again")
    again = build()
    load_adapter(again, tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


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
    """Names that end each other, which PEFT's suffix rules confuse."""

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
    ours = Nested()
    base = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    inject_lora(ours, LoRAConfig.from_dict({"rank": 4, **settings}))
    wake(ours, size=0.5)
    save_adapter(ours, tmp_path / "adapter")
    plain, again = Nested(), Nested()
    plain.load_state_dict(base)
    again.load_state_dict(base)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")  # pyright: ignore[reportArgumentType]
    load_adapter(again, tmp_path / "adapter")
    x = torch.randn(3, 6)
    assert (theirs(x) - ours(x)).abs().max() <= 1e-6
    assert torch.equal(again(x), ours(x))
    assert lora_layers(again).keys() == lora_layers(ours).keys()


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_loads_in_transformers(tied: bool, tmp_path: Path) -> None:
    ours = llama(tie_word_embeddings=tied)
    inject_lora(ours, LoRAConfig(rank=4, adapt_head=not tied, adapt_embeddings=not tied))
    wake(ours)
    before = portrait(ours)
    save_merged(ours, tmp_path / "merged")
    assert portrait(ours) == before
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(ours)).abs().max() <= 1e-5
    assert not any("lora" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))


def test_a_merged_gpt2_equals_pefts_merge(tmp_path: Path) -> None:
    ours, theirs = both("gpt2")
    save_merged(ours, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = theirs.merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


# What PEFT can and this package cannot.

UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "bias of the update": ({"lora_bias": True}, "lora_bias=True"),
    "all biases": ({"bias": "all"}, "bias='all'"),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
}


@pytest.mark.parametrize("feature", UNSUPPORTED)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:.*have invalid shape.*lora_B.bias")
def test_an_unsupported_feature_is_refused_by_name(feature: str, tmp_path: Path) -> None:
    settings, words = UNSUPPORTED[feature]
    wrapped(llama(), **{"target_modules": ["q_proj"]} | settings).save_pretrained(str(tmp_path / "adapter"))
    model = llama()
    before = portrait(model)
    with pytest.raises(AdapterFileError, match="which is not supported") as error:
        load_adapter(model, tmp_path / "adapter")
    assert words in str(error.value)
    assert portrait(model) == before


def test_an_adapter_beside_a_frozen_classifier_loads_in_peft(tmp_path: Path) -> None:
    ours = llama_classifier()
    inject_lora(ours, LoRAConfig(rank=4))
    wake(ours)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(llama_classifier(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-6)


def test_an_adapter_of_layers_that_are_never_called_is_refused(tmp_path: Path) -> None:
    """PEFT adapts WavLM's projections, whose weights its attention reads: the adapter has no effect there."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    sizes |= {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    sizes |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    theirs = peft.get_peft_model(WavLMModel(WavLMConfig(**sizes)), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = WavLMModel(WavLMConfig(**sizes))
    with pytest.raises(AdapterFileError, match=r"q_proj cannot be adapted: WavLMAttention reads its weight"):
        load_adapter(ours, tmp_path / "adapter")
    assert not lora_layers(ours)


def test_another_method_is_refused(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    peft.get_peft_model(llama(), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(AdapterFileError, match=r"of type 'IA3'; only LORA"):
        load_adapter(llama(), tmp_path / "adapter")


def their_folder(tmp_path: Path, **settings: Any) -> Path:
    wrapped(llama(), **{"target_modules": ALL_LINEAR} | settings).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_a_layer_missing_from_pefts_file_is_refused(tmp_path: Path) -> None:
    folder = their_folder(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    model = llama()
    before = portrait(model)
    with pytest.raises(AdapterFileError, match=r"targets 1 layers .*\(model\.layers\.1\.mlp\.up_proj\)"):
        load_adapter(model, folder)
    assert portrait(model) == before


def test_layers_left_out_on_purpose_are_no_loss(tmp_path: Path) -> None:
    folder = their_folder(tmp_path, layers_to_transform=[0])
    model = llama()
    with without_manifest():
        load_adapter(model, folder)
    assert len(lora_layers(model)) == 7
    folder = their_folder(tmp_path / "2", exclude_modules=["layers.1.mlp.up_proj"])
    model = llama()
    with without_manifest():
        load_adapter(model, folder)
    assert len(lora_layers(model)) == 13


def test_a_retrained_copy_of_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = their_folder(tmp_path, target_modules=["q_proj", "embed_tokens"])
    name = f"{PREFIX}model.embed_tokens.base_layer.weight"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert name in tensors, "PEFT no longer saves the base embedding"
    save_file(tensors | {name: tensors[name] + 1}, folder / "adapter_model.safetensors")
    with pytest.raises(BaseMismatchError, match=r"holds a copy of model\.embed_tokens\.weight"):
        load_adapter(llama(), folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 8}, "disagree about the rank"),
        ({"r": "4"}, "disagree about the rank"),
        ({"rank_pattern": {"q_proj": 2}}, "disagree about the rank"),
        ({"rank_pattern": {"(q_proj": 4}}, "cannot be used"),
        ({"rank_pattern": ["q_proj"]}, "cannot be used"),
        ({"lora_alpha": "x"}, "cannot be used"),
        ({"lora_alpha": -1}, "alpha must be greater than 0"),
        ({"lora_alpha": None}, "cannot be used"),
        ({"lora_dropout": 2}, "dropout"),
        ({"peft_type": None}, "only LORA"),
    ],
)
def test_damaged_settings_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = their_folder(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    model = llama()
    before = portrait(model)
    with pytest.raises(AdapterFileError, match=words):
        load_adapter(model, folder)
    assert portrait(model) == before


def test_an_embedding_is_stored_as_peft_stores_it(tmp_path: Path) -> None:
    ours, _ = both("embeddings")
    save_adapter(ours, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert isinstance(lora_layers(ours)["model.embed_tokens"], LoRAEmbedding)
    assert tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"].shape == (4, 64)
    assert tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"].shape == (32, 4)
