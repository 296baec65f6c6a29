"""Merging on disk gives the model that merging in memory gives, and says how exact it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from benchmarks.merge import merge, write_adapter, write_base
from lightning_lora import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    LoRAConfig,
    MergeReport,
    inject_lora,
    save_adapter,
)
from lightning_lora.files.merge.merge_files import CERTIFICATE_FILE, merge_files
from lightning_lora.files.safetensors_file import safetensors_files
from tests.support.tiny_models import gpt2, llama, llama_classifier, logits, tree, wake

TABLES = {"adapt_embeddings": True}
# Model, settings of the adapter, size of a shard.
CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], str]] = {
    "one file": (llama, {}, "1GB"),
    "shards": (llama, {}, "20KB"),
    "tied": (lambda: llama(tie_word_embeddings=True), {}, "20KB"),
    "head and embeddings": (llama, {"adapt_head": True, **TABLES}, "1GB"),
    "patterns": (llama, {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"*.layers.1.*": 5.0}}, "1GB"),
    "rslora": (llama, {"scaling": "rslora", "rank_pattern": {"up_proj": 2}}, "1GB"),
    "gpt2": (gpt2, {}, "1GB"),
    "gpt2 embeddings": (lambda: gpt2(tie_word_embeddings=False), TABLES, "20KB"),
    # Square in every way: the shapes do not tell what is transposed.
    "square tables": (lambda: llama(vocab_size=64, hidden_size=64), {"targets": "mlp", **TABLES}, "1GB"),
    "square positions": (lambda: gpt2(n_positions=32, tie_word_embeddings=False), TABLES, "1GB"),
    "trained in full": (llama, {"trainable": ["norm", "lm_head"]}, "1GB"),
}


def trained(case: str, tmp_path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """An adapted model; its base and its adapter are in ``base`` and ``adapter``."""
    build, settings, shard = CASES[case]
    build().to(dtype).save_pretrained(tmp_path / "base", max_shard_size=shard)  # pyright: ignore[reportArgumentType]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    inject_lora(model, LoRAConfig.from_dict({"rank": 4, **settings}))
    wake(model, size=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.1
    save_adapter(model, tmp_path / "adapter")
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_merged_files_are_the_adapted_model(case: str, tmp_path: Path) -> None:
    model = trained(case, tmp_path)
    before = tree(tmp_path)
    report = merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(merged) - logits(model)).abs().max() <= 1e-5
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")) - logits(model)).abs().max() > 1e-2
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    base_files = {name.partition("/")[2] for name in before if name.startswith("base/")}
    assert set(tree(tmp_path / "out")) == base_files | {CERTIFICATE_FILE}
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1 or CASES[case][2] == "1GB"
    assert len(report.losses) == sum("lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_the_certificate_is_an_independent_float64_computation(
    stored: torch.dtype, dtype: str | None, tmp_path: Path
) -> None:
    trained("one file", tmp_path, stored)
    report = merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype)
    base = load_file(tmp_path / "base" / "model.safetensors")
    out = load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in out.values()} == {getattr(torch, dtype) if dtype else stored}
    assert len(report.losses) == 14
    assert report.losses.keys() == report.max_errors.keys()
    for weight, loss in report.losses.items():
        prefix = f"base_model.model.{weight.removesuffix('.weight')}"
        delta = 8.0 * factors[f"{prefix}.lora_B.weight"].double() @ factors[f"{prefix}.lora_A.weight"].double()
        error = out[weight].double() - (base[weight].double() + delta)
        exactness = 1e-9 if out[weight].dtype == torch.float32 else 1e-3
        assert report.max_errors[weight] == pytest.approx(float(error.abs().max()), rel=exactness)
        assert loss == pytest.approx(float(error.norm() / delta.norm()), rel=exactness)
        # Half a unit in the last place of the type that is stored.
        unit = torch.finfo(out[weight].dtype).eps
        assert report.max_errors[weight] <= unit * float((base[weight].double() + delta).abs().max()) * 1.01
    assert all(torch.equal(out[name], base[name].to(out[name].dtype)) for name in base.keys() - report.losses.keys())
    assert f"rounding changed a weight by at most {max(report.max_errors.values()):.2e} and took" in str(report)
    assert f" {report.worst:.2%} of an update" in str(report)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_update_below_every_step_of_the_type_is_certified_as_lost(dtype: str, tmp_path: Path) -> None:
    base = {"layer.weight": torch.ones(64, 32, dtype=getattr(torch, dtype))}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    write_adapter(tmp_path / "adapter", tmp_path / "base", ["layer.weight"], rank=4)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    small = {name: factor * (1e-9 if "lora_B" in name else 1.0) for name, factor in factors.items()}
    save_file(small, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    report = merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.losses == {"layer.weight": pytest.approx(1.0, rel=1e-5)}
    delta = 2.0 * small["base_model.model.layer.lora_B.weight"] @ small["base_model.model.layer.lora_A.weight"]
    assert report.max_errors["layer.weight"] == pytest.approx(float(delta.abs().max()), rel=1e-5)


def test_the_certificate_is_written_beside_the_model(tmp_path: Path) -> None:
    trained("one file", tmp_path)
    report = merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "bfloat16")
    assert isinstance(report, MergeReport)
    assert report.adapter_sha256 == tree(tmp_path / "adapter")["adapter_model.safetensors"]
    written = json.loads((tmp_path / "out" / CERTIFICATE_FILE).read_text())
    assert written == {
        "base": str(tmp_path / "base"),
        "adapter_sha256": report.adapter_sha256,
        "dtype": "bfloat16",
        "layers": [
            {"weight": name, "max_error": report.max_errors[name], "delta_error": loss}
            for name, loss in report.losses.items()
        ],
    }
    assert len(written["layers"]) == 14
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_shards_keep_their_files_and_their_index(tmp_path: Path) -> None:
    trained("shards", tmp_path)
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
    model = trained("gpt2", tmp_path)
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


def test_merging_again_replaces_the_result(tmp_path: Path) -> None:
    trained("one file", tmp_path)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "bfloat16")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


# Refusals.


def test_another_base_is_refused_unless_allowed(tmp_path: Path) -> None:
    trained("one file", tmp_path)
    llama(seed=1).save_pretrained(tmp_path / "other")
    before, num_threads = tree(tmp_path), torch.get_num_threads()
    with pytest.raises(BaseMismatchError, match=r"is not the weight the adapter was trained on \(digest"):
        merge_files(tmp_path / "other", tmp_path / "adapter", tmp_path / "out")
    assert tree(tmp_path) == before
    assert torch.get_num_threads() == num_threads
    assert not (tmp_path / "out").exists()
    merge_files(tmp_path / "other", tmp_path / "adapter", tmp_path / "out", allow_other_base=True)
    assert (tmp_path / "out" / CERTIFICATE_FILE).is_file()


def test_a_base_of_other_shapes_is_refused_even_if_allowed(tmp_path: Path) -> None:
    trained("one file", tmp_path)
    llama(intermediate_size=40).save_pretrained(tmp_path / "narrow")
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    before = tree(tmp_path)
    with pytest.raises(
        AdapterFileError, match=r"up_proj: the update is \(\d+, \d+\), the weight \(40, 32\)|_proj: the"
    ):
        merge_files(tmp_path / "narrow", tmp_path / "adapter", tmp_path / "out", allow_other_base=True)
    with pytest.raises(AdapterFileError, match=r"7 of 14 adapted weights are not in the checkpoint: model\.layers\.1"):
        merge_files(tmp_path / "shallow", tmp_path / "adapter", tmp_path / "out", allow_other_base=True)
    assert tree(tmp_path) == before


def test_a_resized_trained_part_is_refused(tmp_path: Path) -> None:
    trained("trained in full", tmp_path)
    llama(vocab_size=80).save_pretrained(tmp_path / "other")
    before = tree(tmp_path)
    with pytest.raises(AdapterFileError, match=r"lm_head\.weight: trained as \(64, 32\), in the base \(80, 32\)"):
        merge_files(tmp_path / "other", tmp_path / "adapter", tmp_path / "out", allow_other_base=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("out", ["base", "base/merged", "base/../base/deep/merged"])
def test_the_base_is_never_written_to(out: str, tmp_path: Path) -> None:
    trained("one file", tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="the base is never written to"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / out)
    assert tree(tmp_path) == before


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    trained("one file", tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    llama().save_pretrained(tmp_path / "model")
    before = tree(tmp_path)
    for out in ("out", "model", "adapter"):
        with pytest.raises(AdapterFileError, match=f"{out} is not empty and holds no {CERTIFICATE_FILE}"):
            merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / out)
    assert tree(tmp_path) == before


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    trained("one file", tmp_path)
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "int8")


def test_a_damaged_base_is_refused(tmp_path: Path) -> None:
    trained("one file", tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AdapterFileError, match=r"model\.safetensors"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_overflow_the_type_are_refused(tmp_path: Path) -> None:
    trained("one file", tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterFileError, match=r"up_proj\.weight.*float16"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "float16", allow_other_base=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("written", ["float16", "bfloat16", "float32"])
def test_what_is_not_finite_in_the_base_stays_so_and_hides_no_overflow(written: str, tmp_path: Path) -> None:
    trained("one file", tmp_path)
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
    trained("one file", tmp_path)
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"old weights")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


# Memory.


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
