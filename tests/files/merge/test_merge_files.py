"""Merging on disk gives the model that merging in memory gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.merge import merge, write_adapter, write_base
from lightning_lora import (
    AdapterFileError,
    LoRAConfig,
    inject_lora,
    lora_layers,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.files.merge.merge_files import CERTIFICATE_FILE, merge_files
from lightning_lora.files.safetensors_file import safetensors_files
from tests.support.adapter_files import MERGE_CASES, write_merge_case
from tests.support.tiny_models import llama, llama_classifier, logits, wake
from tests.support.toys import tree


@pytest.mark.parametrize("case", MERGE_CASES)
def test_the_merged_files_are_the_adapted_model(case: str, tmp_path: Path) -> None:
    model = write_merge_case(case, tmp_path)
    before = tree(tmp_path)
    report = merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(merged) - logits(model)).abs().max() <= 1e-5
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")) - logits(model)).abs().max() > 1e-2
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    base_files = {name.partition("/")[2] for name in before if name.startswith("base/")}
    assert set(tree(tmp_path / "out")) == base_files | {CERTIFICATE_FILE}
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1 or MERGE_CASES[case][2] == "1GB"
    assert len(report.losses) == sum("lora_A" in name for name, _ in model.named_parameters())


def test_shards_keep_their_files_and_their_index(tmp_path: Path) -> None:
    write_merge_case("shards", tmp_path)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "bfloat16")
    base, out = safetensors_files(tmp_path / "base"), safetensors_files(tmp_path / "out")
    assert {name: file.name for name, file in base.items()} == {name: file.name for name, file in out.items()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = [tensor for file in set(out.values()) for tensor in load_file(file).values()]
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 2 for tensor in tensors)


def test_a_classifier_merges_with_its_head(tmp_path: Path) -> None:
    llama_classifier().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    inject_lora(model, LoRAConfig(rank=4, trainable=["score"]))
    wake(model, size=0.1)
    model.score.weight.data.normal_()
    save_adapter(model, tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (logits(merged) - logits(model)).abs().max() <= 1e-5


def test_a_checkpoint_of_the_inner_model_is_a_base_too(tmp_path: Path) -> None:
    model = write_merge_case("gpt2", tmp_path)
    AutoModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "inner")
    merge_files(tmp_path / "inner", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(merged) - logits(model)).abs().max() <= 1e-5


def test_tied_weights_trained_in_full_merge_into_the_one_that_is_stored(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    inject_lora(model, LoRAConfig(rank=4, trainable=["embed_tokens"]))
    wake(model, size=0.1)
    model.lm_head.weight.data.add_(0.1 * torch.randn_like(model.lm_head.weight))
    save_adapter(model, tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(merged) - logits(model)).abs().max() <= 1e-5


def test_magnitudes_merge_into_a_bfloat16_base_with_one_rounding(tmp_path: Path) -> None:
    model = write_merge_case("magnitudes", tmp_path, torch.bfloat16)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers: Any = lora_layers(model)
    assert layers
    for name, layer in layers.items():
        A, B = (factor.detach().double() for factor in layer.lora_pair())
        direction = layer.weight.double() + layer.lora_spec.scale * B @ A
        whole = layer.lora_magnitude.detach().double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
        written = merged.get_submodule(name).weight
        assert written.dtype == torch.bfloat16
        # Eight bits: half of the last one, and what float32 adds to it.
        torch.testing.assert_close(written.double(), whole, rtol=2**-8, atol=1e-6 * float(whole.abs().max()), msg=name)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    merge_lora(model)
    for name, layer in layers.items():
        torch.testing.assert_close(layer.weight, merged.get_submodule(name).weight, rtol=2**-7, atol=0)
    unmerge_lora(model)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())


def test_merging_again_replaces_the_result(tmp_path: Path) -> None:
    write_merge_case("one file", tmp_path)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "bfloat16")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


@pytest.mark.parametrize("written", ["float16", "bfloat16", "float32"])
def test_what_is_not_finite_in_the_base_stays_so_and_hides_no_overflow(written: str, tmp_path: Path) -> None:
    write_merge_case("one file", tmp_path)
    file, name = tmp_path / "base" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    save_file(tensors, file, {"format": "pt"})
    arguments = (tmp_path / "base", tmp_path / "adapter", tmp_path / "out", written)
    merge_files(*arguments, allow_other_base=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")[name]
    torch.testing.assert_close(merged[0, :3], tensors[name][0, :3].to(merged.dtype), equal_nan=True)
    assert int(merged.isfinite().logical_not().sum()) == 3
    if written == "float16":
        tensors[name][1, 1] = -1e6
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(AdapterFileError, match=r"up_proj\.weight reaches 1e\+06, more than torch\.float16"):
            merge_files(*arguments, allow_other_base=True)


def test_pickles_in_the_base_are_not_carried_along(tmp_path: Path) -> None:
    write_merge_case("one file", tmp_path)
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"old weights")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_memory_does_not_depend_on_the_size_of_a_tensor(stored: str, dtype: str | None, tmp_path: Path) -> None:
    largest = 64 * 2**20
    names = write_base(tmp_path / "base", getattr(torch, stored), largest, num_shards=2)
    write_adapter(tmp_path / "adapter", tmp_path / "base", names[:2], rank=8)
    run = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype)
    # Less than the tensor itself: one copy of it, in any type, is too many.
    assert run["bytes"] < 0.75 * largest
    assert len(json.loads((tmp_path / "out" / CERTIFICATE_FILE).read_text())["layers"]) == 2
