"""A merge that would give a wrong model is refused, and leaves every file as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
)
from lightning_lora.files.merge.merge_files import CERTIFICATE_FILE, merge_files
from tests.support.adapter_files import write_merge_case
from tests.support.tiny_models import llama
from tests.support.toys import tree


def test_another_base_is_refused_unless_allowed(tmp_path: Path) -> None:
    write_merge_case("one file", tmp_path)
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
    write_merge_case("one file", tmp_path)
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
    write_merge_case("trained in full", tmp_path)
    llama(vocab_size=80).save_pretrained(tmp_path / "other")
    before = tree(tmp_path)
    with pytest.raises(AdapterFileError, match=r"lm_head\.weight: trained as \(64, 32\), in the base \(80, 32\)"):
        merge_files(tmp_path / "other", tmp_path / "adapter", tmp_path / "out", allow_other_base=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("out", ["base", "base/merged", "base/../base/deep/merged"])
def test_the_base_is_never_written_to(out: str, tmp_path: Path) -> None:
    write_merge_case("one file", tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="the base is never written to"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / out)
    assert tree(tmp_path) == before


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    write_merge_case("one file", tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    llama().save_pretrained(tmp_path / "model")
    before = tree(tmp_path)
    for out in ("out", "model", "adapter"):
        with pytest.raises(AdapterFileError, match=f"{out} is not empty and holds no {CERTIFICATE_FILE}"):
            merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / out)
    assert tree(tmp_path) == before


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    write_merge_case("one file", tmp_path)
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "int8")


def test_a_damaged_base_is_refused(tmp_path: Path) -> None:
    write_merge_case("one file", tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AdapterFileError, match=r"model\.safetensors"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_overflow_the_type_are_refused(tmp_path: Path) -> None:
    write_merge_case("one file", tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterFileError, match=r"up_proj\.weight.*float16"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "float16", allow_other_base=True)
    assert not (tmp_path / "out").exists()
