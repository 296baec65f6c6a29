"""PEFT as oracle for convolutions and attention: equal functions both ways."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import load_adapter, lora_layers, lora_state_dict, save_adapter
from lightning_lora.files.adapter.peft_format import PREFIX, TENSOR_FILE
from lightning_lora.files.merge.merge_files import merge_files
from lightning_lora.files.safetensors_file import read_tensors
from tests.oracle.layer_models import BOTH, Net, Upsampling, X, adapted, built, save
from tests.oracle.peft_models import WITHOUT_MANIFEST, without_manifest


class Volume(nn.Module):
    """A three-dimensional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 4, (1, 2, 3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x[:, None]).mean((2, 3, 4)))


# Builder of the module, our settings, PEFT's settings, and whether PEFT adds an output projection twice.
PAIRS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any], bool]] = {
    "all": (Net, {}, {"target_modules": ["conv", "narrow", "attention", "head"]}, True),
    "convolution": (Net, {"targets": ["conv"]}, {"target_modules": ["conv"]}, False),
    "same padding": (
        lambda: Net(padding="same", stride=1),
        {"targets": ["conv", "narrow"]},
        {"target_modules": ["conv", "narrow"]},
        False,
    ),
    "three dimensions": (Volume, {}, {"target_modules": ["conv", "head"]}, False),
    "attention": (Net, {"targets": BOTH}, {"target_modules": ["attention"]}, True),
    "rank and alpha of attention": (
        Net,
        {"targets": [*BOTH, "head"], "rank_pattern": dict.fromkeys(BOTH, 3), "alpha_pattern": dict.fromkeys(BOTH, 8.0)},
        {"target_modules": ["attention", "head"], "rank_pattern": {"attention": 3}, "alpha_pattern": {"attention": 8}},
        True,
    ),
    "rslora": (
        Net,
        {"targets": BOTH, "scaling": "rslora"},
        {"target_modules": ["attention"], "use_rslora": True},
        True,
    ),
}

every_pair = pytest.mark.parametrize("pair", PAIRS)


@every_pair
def test_our_folder_computes_the_same_in_peft(pair: str, tmp_path: Path) -> None:
    build, settings, _, twice = PAIRS[pair]
    module = adapted(build, settings)
    save(module, tmp_path / "ours", twice)
    theirs = peft.PeftModel.from_pretrained(built(build), str(tmp_path / "ours"))  # pyright: ignore
    torch.testing.assert_close(theirs(X), module(X), rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(merged(X), module(X), rtol=1e-5, atol=1e-5)


@every_pair
def test_pefts_folder_computes_the_same_here(pair: str, tmp_path: Path) -> None:
    build, settings, theirs_settings, twice = PAIRS[pair]
    theirs = peft.get_peft_model(built(build), peft.LoraConfig(r=2, lora_alpha=32, **theirs_settings))  # pyright: ignore
    generator = torch.Generator().manual_seed(4)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = built(build)
    with without_manifest():
        load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=1e-5)
    assert lora_layers(ours).keys() == lora_layers(adapted(build, settings)).keys()
    # Saved again, the tensors are those that PEFT wrote.
    save(ours, tmp_path / "ours", twice)
    written, original = (load_file(tmp_path / folder / TENSOR_FILE) for folder in ("ours", "theirs"))
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("targets", [["attention"], ["out_proj"]], ids=["input projection", "output projection"])
def test_a_projection_that_is_not_adapted_is_zero_in_peft(targets: list[str], tmp_path: Path) -> None:
    settings = {"targets": targets, "exclude": ["out_proj"] if targets == ["attention"] else []}
    module = adapted(Net, settings)
    save(module, tmp_path / "ours", targets == ["out_proj"])
    theirs = peft.PeftModel.from_pretrained(built(Net), str(tmp_path / "ours"))  # pyright: ignore
    torch.testing.assert_close(theirs(X), module(X), rtol=1e-5, atol=1e-5)
    again = built(Net)
    load_adapter(again, tmp_path / "ours")
    assert lora_layers(again).keys() == lora_layers(module).keys()
    assert torch.equal(again(X), module(X))


def test_pefts_names_and_shapes(tmp_path: Path) -> None:
    save(adapted(Net, {"targets": ["conv", *BOTH]}), tmp_path / "ours", True)
    shapes = {
        name.removeprefix(PREFIX): tuple(t.shape) for name, t in read_tensors(tmp_path / "ours" / TENSOR_FILE).items()
    }
    assert shapes == {
        "conv.lora_A.weight": (2, 3, 3, 3),
        "conv.lora_B.weight": (8, 2, 1, 1),
        "attention.lora_A.weight": (2, 8),
        "attention.lora_B.weight": (24, 2),
        "attention.base_layer.out_proj.lora_A.weight": (2, 8),
        "attention.base_layer.out_proj.lora_B.weight": (8, 2),
    }


def test_peft_adds_an_output_projection_twice() -> None:
    # https://github.com/huggingface/peft/pull/3774. When this fails, PEFT is fixed: see peft_layers._LAST_TWICE.
    base = built(Net)
    theirs: Any = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attention"])
    )  # pyright: ignore
    projection = theirs.base_model.model.attention.base_layer.out_proj
    A, B = projection.lora_A["default"].weight, projection.lora_B["default"].weight
    B.data.normal_()
    for times, equal in ((1, False), (2, True)):
        plain: Any = copy.deepcopy(base)
        plain.attention.out_proj.weight.data += times * B @ A
        assert torch.allclose(plain(X), theirs(X), atol=1e-5) is equal


def test_a_later_peft_is_taken_to_add_it_once_with_a_warning(tmp_path: Path) -> None:
    peft.get_peft_model(built(Net), peft.LoraConfig(r=2, target_modules=["attention"])).save_pretrained(tmp_path / "a")  # pyright: ignore
    config = tmp_path / "a" / "adapter_config.json"
    state = load_file(tmp_path / "a" / TENSOR_FILE)
    name = f"{PREFIX}attention.base_layer.out_proj.lora_B.weight"
    state[name].normal_()
    save_file(state, tmp_path / "a" / TENSOR_FILE)
    for version, factor in (("0.22.0", 1), ("0.21.9", 2), ("0.17.1", 2)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_version": version}))
        module = built(Net)
        with pytest.warns(UserWarning, match=rf"{WITHOUT_MANIFEST}|adds the update of") as record:
            load_adapter(module, tmp_path / "a")
        assert any("adds the update of attention.out_proj twice" in str(w.message) for w in record) is (factor == 1)
        assert torch.equal(lora_state_dict(module)["attention.out_proj.lora_B"], factor * state[name])


@pytest.mark.parametrize(
    "build", [Net, Upsampling, lambda: Net(groups=3, width=12)], ids=["plain", "transposed", "groups"]
)
def test_merging_files_gives_the_merged_module(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    module = adapted(build, {})
    base = built(build)
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match="PEFT "):
        save_adapter(module, tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    base.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(base(X), module(X), rtol=1e-5, atol=1e-5)
