"""Models that cannot be loaded are refused with the reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_lora import ConfigError, LoRAConfig, TargetNotFoundError
from lightning_lora.tasks import CausalLM
from tests.support import toys
from tests.tasks.conftest import fit, make

pytestmark = toys.expected_warnings


def test_unknown_hub_name_is_refused_with_what_to_give_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"^model 'nobody/no-such-model' cannot be used: .*, or a hub name\. It is not on"
    ):
        CausalLM("nobody/no-such-model")


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be used: .*Give a folder with config.json"):
        CausalLM(str(tmp_path))


@pytest.fixture
def corrupt_folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A model whose weights cannot be read."""
    folder = tmp_path / "corrupt"
    shutil.copytree(llama_folder, folder)
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not json at all")
    return folder


def test_wrong_target_is_refused_before_any_weight_is_read(corrupt_folder: Path) -> None:
    with pytest.raises(TargetNotFoundError, match=r"'q_prj' matches none of the 16 .* did you mean 'q_proj'"):
        make(corrupt_folder, lora=LoRAConfig(rank=2, targets=["q_prj"]))


def test_unreadable_weights_are_refused_by_name(corrupt_folder: Path, tmp_path: Path) -> None:
    module = make(corrupt_folder)
    with pytest.raises(ConfigError, match=r"the weights of .*corrupt' cannot be read: .*Only safetensors files"):
        fit(module, tmp_path)


def test_pickled_weights_are_not_read(llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(llama_folder, folder)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot be read: .*Only safetensors files are loaded"):
        fit(make(folder), tmp_path)


def test_missing_tokenizer_is_named(llama_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama_folder / name, tmp_path / name)
    with pytest.raises(ConfigError, match="there is no usable tokenizer beside model"):
        _ = make(tmp_path).tokenizer


def test_a_folder_that_lacks_weights_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "incomplete"
    shutil.copytree(llama_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("up_proj.weight"))
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != lost},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ConfigError, match=f"lacks 1 weights.*{lost}"):
        CausalLM(str(folder)).configure_model()
