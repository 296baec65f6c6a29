"""What an adapter folder holds, and that saving replaces it as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    AdapterFileError,
    ConfigError,
    LoRAConfig,
    inject_lora,
    load_adapter,
    lora_layers,
    lora_state_dict,
    save_adapter,
)
from lightning_lora.files.adapter.folder import read_adapter_folder
from lightning_lora.files.adapter.manifest import MANIFEST_FILE
from lightning_lora.files.adapter.peft_format import CONFIG_FILE, PREFIX, TENSOR_FILE
from lightning_lora.lora.fingerprint import base_digests, fingerprint
from tests.support.adapter_files import adapted
from tests.support.tiny_models import Net, llama, mlp, portrait, wake
from tests.support.toys import tree


def test_a_folder_holds_pefts_two_files_a_manifest_and_a_card(tmp_path: Path) -> None:
    model = adapted()
    path = save_adapter(model, tmp_path / "new" / "adapter", {"steps": 7, "loss": 0.5})
    assert path == tmp_path / "new" / "adapter"
    assert sorted(tree(path)) == ["README.md", CONFIG_FILE, TENSOR_FILE, MANIFEST_FILE]
    assert [entry.name for entry in path.parent.iterdir()] == ["adapter"]

    manifest = json.loads((path / MANIFEST_FILE).read_text())
    hashes = tree(path)
    for name in (CONFIG_FILE, TENSOR_FILE):
        assert manifest["files"][name] == {"bytes": (path / name).stat().st_size, "sha256": hashes[name]}
    assert manifest["format"] == 1
    assert json.loads(json.dumps(read_adapter_folder(path).manifest.to_dict())) == manifest
    assert manifest["versions"].keys() == {"lightning-lora", "lightning", "torch"}
    assert LoRAConfig.from_dict(manifest["config"]) == LoRAConfig(rank=4)
    assert manifest["summary"] == {"steps": 7, "loss": 0.5}
    assert manifest["base_fingerprint"] == fingerprint(base_digests(llama()))
    tensors = load_file(path / TENSOR_FILE)
    assert manifest["tensors"] == {name: list(tensor.shape) for name, tensor in tensors.items()}
    layers = lora_layers(model)
    assert list(manifest["layers"]) == list(layers)
    assert {layer["role"] for layer in manifest["layers"].values()} == {"attention", "mlp"}
    assert {(layer["rank"], layer["alpha"]) for layer in manifest["layers"].values()} == {(4, 32.0)}
    for name, tensor in lora_state_dict(model).items():
        assert torch.equal(tensors[f"{PREFIX}{name}.weight"], tensor)

    card = (path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    for fact in ("| adapted layers | 14 (8 attention, 6 mlp) |", "| rank | 4 |", "| steps | 7 |", "| loss | 0.5 |"):
        assert fact in card
    assert f"{sum(tensor.numel() for tensor in tensors.values()):,}" in card


def test_the_peft_settings_have_every_key_peft_writes(folder: Path, tmp_path: Path) -> None:
    ours = json.loads((folder / CONFIG_FILE).read_text())
    peft.LoraConfig(target_modules=["q_proj"], r=4).save_pretrained(str(tmp_path / "theirs"))
    theirs = json.loads((tmp_path / "theirs" / CONFIG_FILE).read_text())
    # Those of other methods, absent from older versions, are left out: unknown keys bring warnings there.
    optional = {key for key in theirs if key.endswith("_config")} - {"megatron_config"}
    optional |= {"arrow_config", "qalora_group_size", "use_bdlora"}
    assert theirs.keys() - ours.keys() <= optional
    assert ours.keys() <= theirs.keys()
    assert (ours["r"], ours["lora_alpha"], ours["peft_type"], ours["task_type"]) == (4, 32, "LORA", "CAUSAL_LM")
    assert ours["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert ours["inference_mode"] is True
    assert ours["init_lora_weights"] is True
    assert ours["fan_in_fan_out"] is False


def test_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (save_adapter(adapted(), tmp_path / name) for name in ("first", "second"))
    assert tree(first) == tree(second)


def test_tensors_keep_their_type(tmp_path: Path) -> None:
    def low() -> nn.Module:
        return llama().bfloat16()

    folder = save_adapter(adapted(low), tmp_path / "wide")
    assert {tensor.dtype for tensor in load_file(folder / TENSOR_FILE).values()} == {torch.float32}
    folder = save_adapter(adapted(low, adapter_dtype="bfloat16"), tmp_path / "low")
    assert {tensor.dtype for tensor in load_file(folder / TENSOR_FILE).values()} == {torch.bfloat16}
    model = low()
    load_adapter(model, folder)
    assert {tensor.dtype for tensor in lora_state_dict(model).values()} == {torch.bfloat16}


def test_an_adapter_is_replaced_as_a_whole(folder: Path) -> None:
    (folder / "left over.txt").write_text("of the old one")
    model = adapted(targets=["q_proj"])
    save_adapter(model, folder)
    assert sorted(tree(folder)) == ["README.md", CONFIG_FILE, TENSOR_FILE, MANIFEST_FILE]
    assert len(read_adapter_folder(folder).ranks) == 2


def test_a_failed_save_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = tree(folder)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(targets=["q_proj"]), folder)
    assert tree(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("make", ["file", "folder"])
def test_what_is_no_adapter_is_never_overwritten(make: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if make == "file":
        out.write_text("precious")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(AdapterFileError, match="out is"):
        save_adapter(adapted(), out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(value: float, tmp_path: Path) -> None:
    model = adapted()
    lora_layers(model)["model.layers.1.mlp.up_proj"].lora_B.data[0, :3] = value
    with pytest.raises(AdapterFileError, match=r"not saved: model\.layers\.1\.mlp\.up_proj\.lora_B holds 3 NaN or inf"):
        save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_there_must_be_something_to_save(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapters"):
        save_adapter(mlp(), tmp_path / "adapter")
    with torch.device("meta"):
        empty = Net()
    inject_lora(empty, LoRAConfig(rank=4))
    with pytest.raises(ConfigError, match="on the meta device and have no values"):
        save_adapter(empty, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_saving_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    model = adapted()
    before = portrait(model)
    save_adapter(model, tmp_path / "adapter")
    assert portrait(model) == before


def test_a_reader_sees_the_old_or_the_new_adapter(folder: Path, tmp_path: Path) -> None:
    old = {name: tensor.clone() for name, tensor in read_adapter_folder(folder).factors.items()}
    model = adapted()
    wake(model, seed=5)
    save_adapter(model, folder)
    new = read_adapter_folder(folder).factors
    assert all(torch.equal(new[name], tensor) for name, tensor in lora_state_dict(model).items())
    assert not any(torch.equal(new[name], old[name]) for name in old)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_may_have_any_name_that_a_file_system_takes(tmp_path: Path) -> None:
    """B14: an adapter has no name but that of its folder."""
    model = adapted()
    for name in ("a b", "ünï", "..x", "x..", "a/b"):
        assert (save_adapter(model, tmp_path / name) / CONFIG_FILE).is_file()
    before = tree(tmp_path)
    with pytest.raises(OSError, match="File name too long"):
        save_adapter(model, tmp_path / ("x" * 300))
    for taken in ("", "a"):
        with pytest.raises(AdapterFileError, match="is not ours to replace"):
            save_adapter(model, tmp_path / taken)
    assert tree(tmp_path) == before
