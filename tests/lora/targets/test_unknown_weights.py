"""No weight matrix is left frozen without a word."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_lora import LoRAConfig, inject_lora


class GraphConv(nn.Module):
    """A convolution of a graph network, with a weight of its own and of no kind that torch knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Scaled(nn.Linear):
    """A linear layer with one more matrix, which no adapter reaches."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.mixing = nn.Parameter(torch.randn(4, 4))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = GraphConv()
        self.gates = nn.ParameterList([nn.Parameter(torch.randn(2, 4))])
        self.out = nn.Linear(4, 2)
        self.table = nn.Parameter(torch.randn(3, 4))


def test_parameters_with_two_axes_that_no_target_reaches_are_named() -> None:
    report = inject_lora(Net(), LoRAConfig(rank=1))
    assert {name for name, reason in report.skipped.items() if reason == "of an unknown kind"} == {
        "table",
        "conv.weight",
        "gates.0",
    }
    text = str(report)
    assert "left alone: 3 of an unknown kind" in text
    assert "no adapter for table (Net), conv.weight (GraphConv), gates.0 (ParameterList)" in text


def test_a_second_matrix_of_an_adapted_layer_is_named() -> None:
    report = inject_lora(nn.Sequential(Scaled()), LoRAConfig(rank=1))
    assert "no adapter for 0.mixing (Scaled)" in str(report)


def test_naming_the_module_is_enough() -> None:
    report = inject_lora(Net(), LoRAConfig(rank=1, trainable=["conv"]))
    assert "conv" not in str(report.notes)


@pytest.mark.filterwarnings("ignore:1 targeted layers cannot be adapted")
def test_a_refused_layer_is_told_once() -> None:
    report = inject_lora(nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)), LoRAConfig(rank=1))
    assert list(report.skipped) == ["0"]


def test_known_layers_have_nothing_to_tell() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4, proj_size=2), nn.Embedding(4, 4), nn.MultiheadAttention(4, 1))
    assert "unknown" not in str(inject_lora(net, LoRAConfig(rank=1)))
