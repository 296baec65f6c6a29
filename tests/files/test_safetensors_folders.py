"""Tensors of a checkpoint folder are found in one file or in shards; an index that lies is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_lora.errors import AdapterFileError
from lightning_lora.files.safetensors_file import (
    safetensors_files,
)


def save_shards(folder: Path, weight_map: object) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"c": torch.ones(2)}, folder / "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_checkpoint_of_one_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert safetensors_files(tmp_path) == {"a": tmp_path / "model.safetensors"}


def test_checkpoint_of_shards(tmp_path: Path) -> None:
    first, second = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    save_shards(tmp_path, {"a": first.name, "b": first.name, "c": second.name})
    assert safetensors_files(tmp_path) == {"a": first, "b": first, "c": second}
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(AdapterFileError, match=r"model-2\.safetensors is incomplete"):
        safetensors_files(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model-1.safetensors"}, "'../model-1.safetensors', which is not a plain file name"),
        ({"a": "/etc/passwd"}, "not a plain file name"),
        ({"a": ".."}, "not a plain file name"),
        ({"a": "model-3.safetensors"}, "model-3.safetensors does not exist"),
        ({"a": 5}, "5 does not exist"),
        ({"a": "model-2.safetensors"}, "lists 1 tensors their shards do not hold: a"),
        ({}, "has no weight_map"),
        (["a"], "has no weight_map"),
    ],
)
def test_index_that_lies_is_refused(weight_map: object, message: str, tmp_path: Path) -> None:
    save_shards(tmp_path, weight_map)
    with pytest.raises(AdapterFileError, match=message):
        safetensors_files(tmp_path)


def test_index_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(AdapterFileError, match=r"index.json is damaged: its JSON cannot be parsed"):
        safetensors_files(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"has neither model\.safetensors nor"):
        safetensors_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(
        AdapterFileError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained\('converted'\)"
    ):
        safetensors_files(tmp_path)
