"""Bases on disk in which tied weights are stored in unusual ways, or cannot be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora import AdapterFileError, inject_lora, save_adapter
from lightning_lora.files.merge.merge_files import merge_files
from lightning_lora.files.safetensors_file import safetensors_files
from tests.files.tied.families import assert_equal, logits_of, model_of, train
from tests.files.tied.test_ours import settings
from tests.support.toys import tree


def written(name: str, way: str, layers: str, path: Path, **options: Any) -> Any:
    """Write base and adapter; returns the adapted model."""
    model_of(name).save_pretrained(path / "base", **options)
    model = model_of(name)
    inject_lora(model, settings(name, way, layers))
    train(model)
    save_adapter(model, path / "adapter")
    return model


def change_config(path: Path, **entries: Any) -> None:
    file = path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("layers", ["table", "head"])
@pytest.mark.parametrize("way", ["adapted apart", "adapted as one", "trained as one", "trained apart"])
def test_a_base_that_stores_both_of_two_tied_weights_is_changed_in_both(way: str, layers: str, tmp_path: Path) -> None:
    model = written("llama", way, layers, tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = type(model).from_pretrained(tmp_path / "out")
    assert_equal(logits_of(merged), logits_of(model))
    assert merged.config.tie_word_embeddings == way.endswith("as one")


def test_a_tensor_that_is_added_to_shards_is_in_their_index(tmp_path: Path) -> None:
    model = written("llama", "adapted apart", "head", tmp_path, max_shard_size="10KB")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_equal(logits_of(type(model).from_pretrained(tmp_path / "out")), logits_of(model))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = safetensors_files(tmp_path / "out")
    assert len(set(files.values())) > 1
    assert files["lm_head.weight"] == files["model.embed_tokens.weight"]
    sizes = [tensor.nbytes for file in set(files.values()) for tensor in load_file(file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_names_without_the_first_part_stay_so(tmp_path: Path) -> None:
    model = written("gpt2", "adapted apart", "table", tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(file).items()}, file, {"format": "pt"})
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_equal(logits_of(type(model).from_pretrained(tmp_path / "out")), logits_of(model))


def test_a_model_that_transformers_does_not_know_is_refused_where_its_vocabulary_changes(tmp_path: Path) -> None:
    written("llama", "adapted apart", "table", tmp_path)
    change_config(tmp_path, model_type="unheard-of", architectures=["UnheardOf"])
    before = tree(tmp_path)
    with pytest.raises(AdapterFileError, match=r"changes model\.embed_tokens\.weight, .* write it with save_merged"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tree(tmp_path) == before
    change_config(tmp_path, tie_word_embeddings=False)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    changed = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(changed, load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"])


def test_a_checkpoint_without_the_head_that_shares_the_table_is_refused(tmp_path: Path) -> None:
    written("gpt2", "adapted apart", "table", tmp_path)
    model_of("gpt2").transformer.save_pretrained(tmp_path / "inner")
    with pytest.raises(AdapterFileError, match="is a checkpoint of GPT2Model, which lacks them"):
        merge_files(tmp_path / "inner", tmp_path / "adapter", tmp_path / "out")
