"""Layers that PEFT would compute differently are refused, by PEFT for our folders and here for PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import AdapterFileError, load_adapter, lora_layers, save_adapter
from tests.oracle.layer_models import BOTH, Net, Upsampling, X, adapted, built
from tests.oracle.peft_models import without_manifest


class Recurrent(nn.Module):
    """An LSTM and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.flatten(0, 1))[0])


class Separate(nn.Module):
    """Attention whose keys have a different width."""

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


# PEFT warns before its error.
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


def test_dropout_of_peft_that_cannot_act_is_named(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["attention"], lora_dropout=0.1)
    peft.get_peft_model(built(Net), config).save_pretrained(tmp_path / "theirs")  # pyright: ignore
    with (
        without_manifest(),
        pytest.warns(UserWarning, match="dropout 0.1, which cannot act on 2 of its layers"),
    ):
        load_adapter(built(Net), tmp_path / "theirs")
