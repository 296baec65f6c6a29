"""Layers whose weight is read but which are never called are found in the source of the class."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.lora.targets.uncalled_layers import uncalled_children
from tests.support.tiny_models import Net, llama


class Reader(nn.Module):
    """A module that reads some weights, calls some layers, and does both with others."""

    read: nn.Linear
    sliced: nn.Linear
    called: nn.Linear
    both: nn.Linear
    handed_on: nn.Linear
    asked: nn.Linear
    tied: nn.Linear
    started: nn.Linear
    listed: nn.Linear
    forwarded: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        for name in Reader.__annotations__:
            self.add_module(name, nn.Linear(4, 4))
        self.chain = nn.Sequential(self.listed)
        nn.init.zeros_(self.started.weight)

    def tie_weights(self) -> None:
        self.tied.weight = self.asked.weight

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.read.weight, self.read.bias) @ self.sliced.weight[:2].T
        x = self.called(x.to(self.asked.weight.dtype)) + self.both(x) @ self.both.weight
        if self.asked.weight is None or isinstance(self.asked.weight, nn.Parameter):
            x = checkpoint(self.handed_on, x, use_reentrant=False)
        return x @ self.handed_on.weight + self.listed.weight + self.forwarded.forward(x) + self.forwarded.weight


class Caller(Reader):
    """A subclass that calls what its base reads."""

    def forward(self, x: Tensor) -> Tensor:
        return self.read(super().forward(x))


def test_layers_that_are_only_read_are_found() -> None:
    assert uncalled_children(Reader()) == {"read", "sliced"}
    assert uncalled_children(Caller()) == {"sliced"}


def test_layers_that_are_called_are_not() -> None:
    assert uncalled_children(Net()) == frozenset()
    assert not any(uncalled_children(module) for module in llama().modules())


def test_nothing_is_told_of_a_class_without_source() -> None:
    namespace: dict[str, type[Reader]] = {"Reader": Reader}
    exec("class Typed(Reader):\n    pass", namespace)
    assert uncalled_children(namespace["Typed"]()) == {"read", "sliced"}
    made: type[nn.Module] = type("Made", (nn.Module,), {})
    module = made()
    module.proj = nn.Linear(2, 2)
    assert uncalled_children(module) == frozenset()


def test_the_attention_of_wavlm_is_found() -> None:
    with torch.device("meta"):
        attention = transformers.models.wavlm.modeling_wavlm.WavLMAttention(8, 2)
    assert uncalled_children(attention) == {"q_proj", "k_proj", "v_proj", "out_proj"}
