"""Fused experts merge into checkpoints that store them one by one, or fused, either way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_lora import AdapterFileError, BaseMismatchError, LoRAConfig, inject_lora, merge_lora, save_adapter
from lightning_lora.files.merge.merge_files import merge_files
from lightning_lora.files.merge.merged_model import save_merged
from lightning_lora.files.merge.stored_experts import FusedWeight, expert_parts, row_numbers
from lightning_lora.files.safetensors_file import safetensors_files
from lightning_lora.lora.fingerprint import PiecewiseDigest, weight_print
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.experts import LoRAFusedExperts
from tests.support.moe_models import BUILDERS, moe
from tests.support.tiny_models import logits, wake
from tests.support.toys import tree

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT looks for the patterns of parameters among the modules (and finds them where it needs them).
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]


def base_and_adapter(name: str, folder: Path, fused: bool = False, **settings: Any) -> Any:
    """The adapted model; what it is made of is in ``base`` and ``adapter``."""
    model = moe(name)
    # A shard ends within the experts of a layer.
    model.save_pretrained(folder / "base", max_shard_size="40KB", save_original_format=not fused)
    inject_lora(model, LoRAConfig(**{"rank": 4, **settings}))
    wake(model, size=0.1)
    save_adapter(model, folder / "adapter")
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merged_model(folder: Path) -> Any:
    merge_files(folder / "base", folder / "adapter", folder / "out")
    return AutoModelForCausalLM.from_pretrained(folder / "out").eval()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["own factors", "shared factors"])
@pytest.mark.parametrize("fused", [False, True], ids=["as published", "as in the model"])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_merged_files_are_the_adapted_mixture(name: str, fused: bool, shared: bool, tmp_path: Path) -> None:
    model = base_and_adapter(name, tmp_path, fused, share_expert_factors=shared)
    before, wanted = tree(tmp_path / "base"), logits(model)
    merged = merged_model(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert (logits(base) - wanted).abs().max() > 1e-2
    assert (logits(merged) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert tree(tmp_path / "base") == before
    merge_lora(model)
    state = model.state_dict()
    for key, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, state[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_files_are_those_of_the_model_merged_in_memory(name: str, tmp_path: Path) -> None:
    model = base_and_adapter(name, tmp_path)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    save_merged(model, tmp_path / "memory")
    on_disk = tensors_of(tmp_path / "out")
    in_memory = load_file(tmp_path / "memory" / "model.safetensors")
    assert on_disk.keys() == in_memory.keys()
    for key, value in in_memory.items():
        torch.testing.assert_close(on_disk[key], value, rtol=1e-6, atol=1e-7)


def test_every_stored_expert_has_its_certificate(tmp_path: Path) -> None:
    model = base_and_adapter("qwen3_moe", tmp_path, targets="experts")
    report = merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "bfloat16")
    deltas = {
        name: layer.weight_delta("gate_up_proj").detach().double()
        for name, layer in lora_layers(model).items()
        if isinstance(layer, LoRAFusedExperts)
    }
    assert len(report.losses) == 2 * 4 * 3
    base, out = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    for layer in range(2):
        for expert in range(4):
            for half, projection in enumerate(("gate_proj", "up_proj")):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                delta = deltas[f"model.layers.{layer}.mlp.experts"][expert].chunk(2)[half]
                error = out[name].double() - (base[name].double() + delta)
                # The factors' product was formed in float32 here.
                assert report.max_errors[name] == pytest.approx(float(error.abs().max()), rel=1e-4)
                assert report.losses[name] == pytest.approx(float(error.norm() / delta.norm()), rel=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_an_adapter_of_peft_merges_alike(name: str, tmp_path: Path) -> None:
    moe(name).save_pretrained(tmp_path / "base")
    where = "feed_forward" if name == "llama4" else "mlp"
    settings = peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "v_proj"],
        target_parameters=[f"{where}.experts.gate_up_proj", f"{where}.experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
    )
    theirs = peft.get_peft_model(moe(name), settings)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(str(tmp_path / "adapter"))
    wanted = logits(theirs.eval())
    base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval())
    assert (base - wanted).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged_model(tmp_path)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_shapes_alike_both_ways_round_are_told_apart(name: str, tmp_path: Path) -> None:
    moe(name, intermediate_size=16).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    inject_lora(model, LoRAConfig(rank=4, targets="experts"))
    wake(model, size=0.1)
    save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(merged_model(tmp_path)), logits(model), rtol=1e-5, atol=1e-5)


def test_a_router_that_is_stored_under_another_name_merges_too(tmp_path: Path) -> None:
    model = base_and_adapter("mixtral", tmp_path, targets="attention", trainable=["mlp.gate"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.add_(torch.randn_like(layer.mlp.gate.weight))
    save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(merged_model(tmp_path)), logits(model), rtol=1e-5, atol=1e-5)


# The check of the base.


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_one_other_expert_is_another_base(name: str, tmp_path: Path) -> None:
    base_and_adapter(name, tmp_path, targets="experts")
    files = safetensors_files(tmp_path / "base")
    changed, file = next(item for item in files.items() if ".experts." in item[0] and not item[0].endswith("bias"))
    tensors = load_file(file)
    tensors[changed].view(-1)[-1] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BaseMismatchError, match=r"experts\.\w+ is not the weight the adapter was trained on \(digest"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_other_base=True)


# Orientation in the model, and what the checkpoint makes of it.
LAYOUTS: dict[str, Any] = {
    "one by one": lambda fused: {str(e): expert for e, expert in enumerate(fused)},
    "halves": lambda fused: {f"{e}{h}": x for e, expert in enumerate(fused) for h, x in enumerate(expert.chunk(2))},
    "turned": lambda fused: {"all": fused.mT.contiguous()},
    "interleaved": lambda fused: {"all": fused.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)},
    "pairs of experts": lambda fused: {str(pair): half for pair, half in enumerate(fused.chunk(2))},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 300, 200)], ids=["read whole", "sampled"])
def test_parts_know_their_rows_their_update_and_their_samples(layout: str, shape: tuple[int, ...]) -> None:
    fused = FusedWeight("experts.up", shape, transposed=False)
    cut = LAYOUTS[layout]
    A, B = torch.randn(4, 3, shape[2]), torch.randn(4, shape[1], 3)
    weight, delta = torch.randn(shape), 2 * B.double() @ A.double()
    parts = expert_parts(fused, cut(row_numbers(fused)), {})
    stored: dict[str, Tensor] = cut(weight)
    assert parts.keys() == stored.keys()
    digest = PiecewiseDigest(shape)
    for name, part in parts.items():
        update = part.update(name, A, B, 2.0, tuple(stored[name].shape))
        found = torch.cat([block.compute().reshape(-1) for block in update.blocks()])
        torch.testing.assert_close(found, cut(delta)[name].reshape(-1))
        positions, numbers = part.sampled(digest.step)
        assert bool((positions.diff() > 0).all())
        digest.add(numbers, stored[name].reshape(-1)[positions])
    assert digest.print() == weight_print(weight)


# Refusals.


def test_rows_of_several_experts_in_one_tensor_are_refused() -> None:
    fused = FusedWeight("experts.up", (2, 4, 3), transposed=False)
    numbers = row_numbers(fused)
    with pytest.raises(AdapterFileError, match=r"all mixes rows of several experts of experts\.up"):
        expert_parts(fused, {"all": numbers.reshape(1, 8, 1)}, {})
    with pytest.raises(AdapterFileError, match=r"a and others hold 4 of the 8 rows of experts\.up"):
        expert_parts(fused, {"a": numbers[0]}, {})


def test_a_base_that_does_not_say_what_it_is_is_refused(tmp_path: Path) -> None:
    base_and_adapter("mixtral", tmp_path)
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(AdapterFileError, match=r"which model it is cannot be told"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    base_and_adapter("qwen3_moe", tmp_path)
    index = tmp_path / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.1.mlp.experts.2.up_proj.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(AdapterFileError, match=r"not in the checkpoint: model\.layers\.1\.mlp\.experts\.2\.up_proj"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_experts_of_another_number_or_kind_do_not_fit(tmp_path: Path) -> None:
    base_and_adapter("mixtral", tmp_path)
    moe("mixtral", num_local_experts=8).save_pretrained(tmp_path / "more")
    with pytest.raises(AdapterFileError, match=r"experts.gate_up_proj are 8 experts .* the adapter has 4"):
        merge_files(tmp_path / "more", tmp_path / "adapter", tmp_path / "out", allow_other_base=True)
    moe("llama4").save_pretrained(tmp_path / "llama4")
    with pytest.raises(AdapterFileError, match=r"Llama4ForCausalLM has no fused experts model\.layers\.0\.mlp"):
        merge_files(tmp_path / "llama4", tmp_path / "adapter", tmp_path / "out", allow_other_base=True)
    assert not (tmp_path / "out").exists()


def test_codes_of_a_quantised_checkpoint_are_refused(tmp_path: Path) -> None:
    base_and_adapter("qwen3_moe", tmp_path)
    for file in (tmp_path / "base").glob("*.safetensors"):
        tensors = load_file(file)
        narrow = {k: v.to(torch.float8_e4m3fn) if v.ndim > 1 else v for k, v in tensors.items()}
        save_file(narrow, file, {"format": "pt"})
    with pytest.raises(AdapterFileError, match=r"is stored as torch\.float8_e4m3fn, quantised"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_other_base=True)
