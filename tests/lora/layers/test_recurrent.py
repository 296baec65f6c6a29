"""Recurrent layers and cells: every direction, number of layers, projection, and packed sequences."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_lora import ConfigError, LoRAConfig, inject_lora, lora_layers
from lightning_lora.lora.layers import LoRARecurrent
from tests.lora.layers.laws import Case, Laws, numbers
from tests.support.tiny_models import wake

# Torch says so of every layer with a projection, adapted or not.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


def steps() -> tuple[Tensor]:
    return (numbers(5, 3, 4),)


def packed() -> tuple[PackedSequence]:
    return (pack_padded_sequence(numbers(5, 3, 4), torch.tensor([5, 2, 4]), enforce_sorted=False),)


def states() -> tuple[Any, ...]:
    return numbers(5, 3, 4), (numbers(1, 3, 6, seed=1), numbers(1, 3, 6, seed=2))


class TestRecurrentLayers(Laws):
    kinds = ("projection", "packed")
    cases = {
        "rnn": Case(lambda: nn.RNN(4, 6), steps, 2),
        "rnn with relu": Case(lambda: nn.RNN(4, 6, nonlinearity="relu"), steps, 2),
        "gru": Case(lambda: nn.GRU(4, 6), steps, 2),
        "lstm": Case(lambda: nn.LSTM(4, 6), steps, 2),
        "no bias": Case(lambda: nn.LSTM(4, 6, bias=False), steps, 2),
        "layers": Case(lambda: nn.GRU(4, 6, 3), steps, 6),
        "both directions": Case(lambda: nn.LSTM(4, 6, 2, bidirectional=True), steps, 8),
        "projection": Case(lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3), steps, 12),
        "batch first": Case(lambda: nn.GRU(4, 6, batch_first=True), steps, 2),
        "no batch": Case(lambda: nn.GRU(4, 6), lambda: (numbers(5, 4),), 2),
        "packed": Case(lambda: nn.LSTM(4, 6, 2, bidirectional=True), packed, 8),
        "one weight of two": Case(lambda: nn.LSTM(4, 6), steps, 1, {"targets": ["layer.weight_hh_l0"]}),
        "rank of one": Case(lambda: nn.LSTM(4, 6), steps, 2, {"rank_pattern": {"layer.weight_hh_l0": 1}}),
    }


class TestCells(Laws):
    kinds = ("lstm",)
    cases = {
        "rnn": Case(lambda: nn.RNNCell(4, 6), lambda: (numbers(3, 4), numbers(3, 6)), 2),
        "gru": Case(lambda: nn.GRUCell(4, 6), lambda: (numbers(3, 4), numbers(3, 6)), 2),
        "lstm": Case(lambda: nn.LSTMCell(4, 6), lambda: (numbers(3, 4), (numbers(3, 6), numbers(3, 6, seed=2))), 2),
    }


def test_a_given_state_is_used() -> None:
    inputs, (hidden, cell) = states()
    layer = nn.LSTM(4, 6).double()
    inject_lora(layer, LoRAConfig(rank=2))
    wake(layer, size=0.5)
    assert not torch.equal(layer(inputs, (hidden, cell))[0], layer(inputs)[0])


def test_factors_are_named_after_their_weights() -> None:
    layer = nn.LSTM(4, 6, bidirectional=True, proj_size=3)
    inject_lora(layer, LoRAConfig(rank=2))
    assert isinstance(layer, LoRARecurrent)
    shapes = {name: tuple(factor.shape) for name, factor in layer.lora_factors().items()}
    assert shapes["weight_ih_l0_lora_A"] == (2, 4)
    assert shapes["weight_hh_l0_reverse_lora_B"] == (24, 2)
    assert (shapes["weight_hr_l0_lora_A"], shapes["weight_hr_l0_lora_B"]) == ((2, 6), (3, 2))


def test_nothing_of_a_call_lives_on_in_the_layer() -> None:
    layer = nn.LSTM(4, 6)
    inject_lora(layer, LoRAConfig(rank=2))
    wake(layer)
    seen = []
    layer.register_forward_hook(lambda *_: None)
    original = LoRARecurrent.effective_weights

    def watched(self: Any) -> dict[str, Tensor]:
        weights = original(self)
        seen.extend(map(weakref.ref, weights.values()))
        return weights

    layer.__dict__["effective_weights"] = lambda: watched(layer)
    y = layer(numbers(5, 3, 4).float())[0]
    assert len(seen) == 2
    del y
    gc.collect()
    assert [reference() for reference in seen] == [None, None]
    assert all(
        weight is layer._parameters[name]
        for weight, name in zip(layer._flat_weights, layer._flat_weights_names, strict=True)
    )


def test_an_error_in_forward_leaves_the_weights_in_place() -> None:
    layer = nn.GRU(4, 6)
    inject_lora(layer, LoRAConfig(rank=2))
    before = dict(layer._parameters)
    with pytest.raises(RuntimeError, match=r"input\.size"):
        layer(torch.zeros(5, 3, 7))
    assert all(layer._parameters[name] is parameter for name, parameter in before.items())
    assert lora_layers(layer)[""].lora_active


def test_moving_and_casting_an_adapted_layer_keeps_it_working() -> None:
    layer = nn.LSTM(4, 6)
    inject_lora(layer, LoRAConfig(rank=2))
    wake(layer, size=0.5)
    x = numbers(5, 3, 4)
    torch.testing.assert_close(layer.double()(x)[0].float(), layer.float()(x.float())[0], rtol=1e-5, atol=1e-5)


def test_dropout_on_the_update_is_refused() -> None:
    module = nn.ModuleDict({"rnn": nn.LSTM(4, 6), "head": nn.Linear(6, 2)})
    with pytest.raises(ConfigError, match=r"dropout=0.1 cannot act on 1 of the targeted layers \(rnn\)"):
        inject_lora(module, LoRAConfig(rank=2, dropout=0.1))
    assert not lora_layers(module)
    inject_lora(module, LoRAConfig(rank=2, dropout=0.1, exclude=["rnn"]))
