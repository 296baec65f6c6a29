"""PEFT as oracle for convolutions and attention: equal functions both ways, or an error, never another function."""

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

from lightning_lora import (
    AdapterFileError,
    LoRAConfig,
    inject_lora,
    load_adapter,
    lora_layers,
    lora_state_dict,
    save_adapter,
)
from lightning_lora.files.adapter.peft_format import PREFIX, TENSOR_FILE
from lightning_lora.files.merge.merge_files import merge_files
from lightning_lora.files.safetensors_file import read_tensors
from tests.lora.layers.laws import numbers
from tests.support.tiny_models import wake

WITHOUT_MANIFEST = r"has no lightning_lora\.json"
TWICE = "PEFT up to 0.21 adds the update of .* twice"


class Net(nn.Module):
    """A convolution, then attention over its positions."""

    def __init__(self, width: int = 8, **options: Any) -> None:
        super().__init__()
        settings: dict[str, Any] = {"padding": 1, "stride": 2}
        self.conv = nn.Conv2d(3, width, 3, **settings | options)
        self.narrow = nn.Conv1d(width, width, 2)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(torch.relu(self.conv(x)).flatten(2)).transpose(1, 2)
        return self.head(y + self.attention(y, y, y)[0])


class Volume(nn.Module):
    """A convolution of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 4, (1, 2, 3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x[:, None]).mean((2, 3, 4)))


X = numbers(2, 3, 6, 6).float()

BOTH = ["attention", "attention.out_proj"]
# Model, our settings, what PEFT is told, and whether a doubled output projection is concerned.
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


def built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().train()


def adapted(build: Callable[[], nn.Module], settings: dict[str, Any]) -> nn.Module:
    module = built(build)
    inject_lora(module, LoRAConfig.from_dict({"rank": 2, **settings}))
    wake(module, size=0.1)
    return module


def save(module: nn.Module, path: Path, twice: bool) -> None:
    if twice:
        with pytest.warns(UserWarning, match=TWICE):
            save_adapter(module, path)
    else:
        save_adapter(module, path)


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
    with pytest.warns(UserWarning, match=WITHOUT_MANIFEST):
        load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=1e-5)
    assert lora_layers(ours).keys() == lora_layers(adapted(build, settings)).keys()
    # And onward: what was PEFT's is written as PEFT would.
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


class Recurrent(nn.Module):
    """An LSTM and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.flatten(0, 1))[0])


class Upsampling(nn.Module):
    """A transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class Separate(nn.Module):
    """Attention whose keys have another width."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, kdim=3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1, 2)
        return self.attention(y, y[..., :3], y)[0]


CONV: dict[str, Any] = {"targets": ["conv"]}
INEXPRESSIBLE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str, str]] = {
    "groups": (lambda: Net(groups=3, width=12), CONV, r"conv \(groups=3\)", "conv"),
    "groups that divide the rank": (
        lambda: Net(groups=3, width=12),
        CONV | {"rank_pattern": {"conv": 3}},
        r"conv \(groups=3\)",
        "conv",
    ),
    "dilation": (lambda: Net(dilation=2), CONV, r"conv \(dilation=\(2, 2\)\)", "conv"),
    "padding": (lambda: Net(padding_mode="circular"), CONV, r"conv \(padding_mode='circular'\)", "conv"),
    "another rank": (
        Net,
        {"targets": BOTH, "rank_pattern": {"out_proj": 1}},
        r"not the rank and alpha of its",
        "out_proj",
    ),
    "another alpha": (
        Net,
        {"targets": BOTH, "alpha_pattern": {"out_proj": 1.0}},
        r"not the rank and alpha",
        "out_proj",
    ),
    "recurrent": (Recurrent, {}, r"rnn.weight_ih_l0 \(LSTM\)", "LSTM"),
    "transposed": (Upsampling, {}, r"up \(ConvTranspose2d\)", "ConvTranspose2d"),
    "other widths": (
        Separate,
        {"targets": BOTH[:1]},
        r"attention.q_proj_weight \(separate projections\)",
        "same embed",
    ),
}


# PEFT's own warning on the way to its error.
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
@pytest.mark.parametrize("row", INEXPRESSIBLE)
def test_what_peft_would_compute_otherwise_it_refuses_and_a_warning_says_so(row: str, tmp_path: Path) -> None:
    build, settings, words, theirs = INEXPRESSIBLE[row]
    module = adapted(build, settings)
    with pytest.warns(UserWarning, match=rf"PEFT cannot load this adapter.*{words}") as record:
        save_adapter(module, tmp_path / "ours")
    assert len(record) == 1
    again = built(build)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(X), module(X))
    with pytest.raises((RuntimeError, ValueError), match=theirs):
        peft.PeftModel.from_pretrained(built(build), str(tmp_path / "ours"))  # pyright: ignore


@pytest.mark.parametrize(
    "options", [{"dilation": 2}, {"padding_mode": "reflect"}], ids=lambda options: next(iter(options))
)
def test_what_peft_trained_otherwise_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(built(lambda: Net(**options)), peft.LoraConfig(r=2, target_modules=["conv"]))  # pyright: ignore
    theirs.save_pretrained(str(tmp_path / "theirs"))
    module = built(lambda: Net(**options))
    with pytest.raises(
        AdapterFileError, match=r"trained by PEFT, which ignores groups, dilation and padding mode.*conv"
    ):
        load_adapter(module, tmp_path / "theirs")
    assert not lora_layers(module)


def test_peft_adds_an_output_projection_twice() -> None:
    # https://github.com/huggingface/peft/pull/3774. When this fails, PEFT is mended: see peft_layers._LAST_TWICE.
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


def test_dropout_of_peft_that_cannot_act_is_named(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["attention"], lora_dropout=0.1)
    peft.get_peft_model(built(Net), config).save_pretrained(tmp_path / "theirs")  # pyright: ignore
    with (
        pytest.warns(UserWarning, match=WITHOUT_MANIFEST),
        pytest.warns(UserWarning, match="dropout 0.1, which cannot act on 2 of its layers"),
    ):
        load_adapter(built(Net), tmp_path / "theirs")


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
