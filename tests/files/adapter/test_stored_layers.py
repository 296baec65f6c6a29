"""Adapters with one LoRA for each expert, as transformers 4 names them, load into fused experts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import AdapterFileError, load_adapter, lora_layers, merge_lora, save_adapter, unmerge_lora
from lightning_lora.files.adapter.peft_format import PREFIX, TENSOR_FILE
from lightning_lora.files.merge.merge_files import merge_files
from tests.oracle.peft_models import peft_warnings
from tests.support.moe_models import moe
from tests.support.tiny_models import logits, portrait

pytestmark = [
    *peft_warnings,
    pytest.mark.filterwarnings("ignore:.*has no lightning_lora.json:UserWarning"),
    # PEFT compares patterns with names of modules, and says so of patterns that it does use for parameters.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

# Model: the module of the experts and of the router in transformers 4, its gate, up and down projection.
MODELS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_next": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
SETTINGS: dict[str, Any] = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"}


def old_layers(name: str) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Layer of transformers 4 to the parameter that holds its weight now, and to the place of the weight in it."""
    block, (gate, up, down) = MODELS[name]
    found: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}
    for parameter, tensor in moe(name).named_parameters():
        layer, _, leaf = parameter.rpartition(".")
        if leaf in ("gate_up_proj", "down_proj") and tensor.ndim == 3:
            inner = tensor.shape[1] // 2
            for expert in range(len(tensor)):
                old = f"{layer.replace('mlp', block)}.{expert}"
                if leaf == "down_proj":
                    found[f"{old}.{down}"] = (parameter, lambda t, e=expert: t[e])
                else:
                    found[f"{old}.{gate}"] = (parameter, lambda t, e=expert, i=inner: t[e, :i])
                    found[f"{old}.{up}"] = (parameter, lambda t, e=expert, i=inner: t[e, i:])
        elif leaf == "weight" and layer.endswith(("proj", ".gate")) and tensor.ndim == 2:
            found[layer.replace("mlp.gate", f"{block}.gate") if layer.endswith(".gate") else layer] = (
                parameter,
                lambda t: t,
            )
    return found


def write(name: str, folder: Path, leaves: list[str], **settings: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Write an adapter as PEFT wrote it under transformers 4, for the layers with these last parts; its factors."""
    every: dict[str, Any] = SETTINGS | {"target_modules": leaves} | settings
    config = peft.LoraConfig(**every)
    folder.mkdir()
    config.save_pretrained(str(folder))
    generator = torch.Generator().manual_seed(0)
    parameters, factors = dict(moe(name).named_parameters()), {}
    for layer, (parameter, place) in old_layers(name).items():
        if layer.rpartition(".")[2] in leaves:
            num_out, num_in = place(parameters[parameter]).shape
            rank = next(
                (r for key, r in settings.get("rank_pattern", {}).items() if re.fullmatch(f".*{key}", layer)), config.r
            )
            A = 0.3 * torch.randn(rank, num_in, generator=generator)
            factors[layer] = (A, 0.3 * torch.randn(num_out, rank, generator=generator))
    tensors = {
        f"{PREFIX}{n}.lora_{end}.weight": t for n, pair in factors.items() for end, t in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / TENSOR_FILE)
    return factors


def expected(name: str, factors: dict[str, tuple[Tensor, Tensor]], scale: Callable[[str, int], float]) -> Tensor:
    """Logits of the model with every update added to its weight."""
    model, layers = moe(name), old_layers(name)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer, (A, B) in factors.items():
            parameter, place = layers[layer]
            place(parameters[parameter]).add_(scale(layer, len(A)) * (B @ A))
    return logits(model)


def check(name: str, folder: Path, wanted: Tensor) -> nn.Module:
    """The model with the adapter loaded, after comparing it, merged too, with the logits that are wanted."""
    model = moe(name)
    load_adapter(model, folder)
    tolerance = 1e-5 * float(wanted.abs().max())
    assert (logits(model) - wanted).abs().max() <= tolerance
    merge_lora(model)
    assert (logits(model) - wanted).abs().max() <= tolerance
    unmerge_lora(model)
    assert (wanted - logits(moe(name))).abs().max() > 1e-2
    return model


@pytest.mark.parametrize("name", MODELS)
def test_experts_and_router_load_as_the_sum_of_their_updates(name: str, tmp_path: Path) -> None:
    leaves = sorted({layer.rpartition(".")[2] for layer in old_layers(name)})
    wanted = expected(name, write(name, tmp_path / "a", leaves), lambda layer, rank: 2.0)
    model = check(name, tmp_path / "a", wanted)
    moe(name).save_pretrained(tmp_path / "base")
    merge_files(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    merged = type(moe(name)).from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    # A model loaded from a checkpoint knows the names of that checkpoint, which are others.
    loaded = type(moe(name)).from_pretrained(tmp_path / "base").eval()
    load_adapter(loaded, tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    save_adapter(model, tmp_path / "again")
    again, theirs = moe(name), peft.PeftModel.from_pretrained(moe(name), str(tmp_path / "again"))
    load_adapter(again, tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert (logits(theirs) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_function_is_that_of_pefts_own_conversion(name: str, tmp_path: Path) -> None:
    leaves = [*MODELS[name][1], "gate", "q_proj"]
    write(name, tmp_path / "a", leaves)
    theirs = peft.PeftModel.from_pretrained(moe(name), str(tmp_path / "a"))
    check(name, tmp_path / "a", logits(theirs))


PARTS: dict[str, tuple[list[str], dict[str, Any], Callable[[str, int], float]]] = {
    "one projection alone": (["w3"], {}, lambda layer, rank: 2.0),
    "ranks and alphas of their own": (
        ["w1", "w2", "w3"],
        {"rank_pattern": {"w1": 2, r"experts\.2\.w3": 5}, "alpha_pattern": {"w3": 9}},
        lambda layer, rank: (9 if layer.endswith("w3") else 6) / rank,
    ),
    "rank-stabilised": (["w1", "w2", "w3"], {"use_rslora": True}, lambda layer, rank: 6 / rank**0.5),
    "ranks above the size": (["w1", "w2"], {"r": 40}, lambda layer, rank: 6 / 40),
}


@pytest.mark.parametrize("case", PARTS)
def test_each_expert_keeps_its_rank_and_scale(case: str, tmp_path: Path) -> None:
    leaves, settings, scale = PARTS[case]
    factors = write("mixtral", tmp_path / "a", leaves, **settings)
    check("mixtral", tmp_path / "a", expected("mixtral", factors, scale))


def test_experts_of_numbered_layers_load(tmp_path: Path) -> None:
    factors = write("qwen3_moe", tmp_path / "a", ["down_proj"], layers_to_transform=[1])
    kept = {layer: pair for layer, pair in factors.items() if ".layers.1." in layer}
    tensors = load_file(tmp_path / "a" / TENSOR_FILE)
    save_file({n: t for n, t in tensors.items() if ".layers.1." in n}, tmp_path / "a" / TENSOR_FILE)
    model = check("qwen3_moe", tmp_path / "a", expected("qwen3_moe", kept, lambda layer, rank: 2.0))
    assert set(lora_layers(model)) == {"model.layers.1.mlp.experts"}


def test_a_model_inside_a_module_takes_them_too(tmp_path: Path) -> None:
    class Task(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = moe("mixtral")

    write("mixtral", tmp_path / "a", ["w1", "w2", "w3"])
    task, plain = Task(), moe("mixtral")
    load_adapter(task, tmp_path / "a")
    load_adapter(plain, tmp_path / "a")
    assert torch.equal(logits(task.net), logits(plain))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: {n: v for n, v in t.items() if "1.block_sparse_moe.experts.2.w1" not in n},
            r"names 1 experts.*2\.w1",
        ),
        (lambda t: {n: v[:, :-1].contiguous() if "lora_A" in n else v for n, v in t.items()}, r"experts\.0\.w1 maps"),
        (lambda t: {n.replace("experts.3.", "experts.7."): v for n, v in t.items()}, r"names .* experts .*experts\.3"),
    ],
    ids=["an expert is missing", "other sizes", "more experts than the model has"],
)
def test_experts_that_do_not_fit_are_named(change: Callable[..., Any], words: str, tmp_path: Path) -> None:
    write("mixtral", tmp_path / "a", ["w1", "w2", "w3"])
    save_file(change(load_file(tmp_path / "a" / TENSOR_FILE)), tmp_path / "a" / TENSOR_FILE)
    model = moe("mixtral")
    before = portrait(model)
    with pytest.raises(AdapterFileError, match=words):
        load_adapter(model, tmp_path / "a")
    assert portrait(model) == before


def test_a_checkpoint_of_fused_experts_is_merged_with_them(tmp_path: Path) -> None:
    factors = write("mixtral", tmp_path / "a", ["w1", "w2", "w3"])
    (tmp_path / "base").mkdir()
    model = moe("mixtral")
    model.config.save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["MixtralForCausalLM"]}))
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    merge_files(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    model.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    wanted = expected("mixtral", factors, lambda layer, rank: 2.0)
    assert (logits(model) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
