"""Where rows cannot be told apart, a step of one micro-batch is not measured, and a message says why (F23)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.batch.noise.row_layers import row_layers
from lightning_lora.errors import ConfigError
from lightning_lora.lora.layers.adapted import lora_layers
from tests.batch.noise.row_modules import Own
from tests.support import tiny_models, toys
from tests.support.monitored import fit

pytestmark = [*toys.expected_warnings, *toys.monitor_warnings]


class Bypassed(nn.Module):
    """Uses the update of its first layer a second time, outside of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        update: Any = self.first
        return self.last(self.first(x) + F.linear(x, update.weight_delta()))


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Any = checkpoint(lambda x: torch.tanh(self.first(x)), x, use_reentrant=False)
        return self.last(y)


class Flat(nn.Module):
    """Flattens rows and positions into one axis before its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.reshape(-1, 2)))).reshape(len(x), 2)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (
            Bypassed,
            r"the row gradients of net\.first\.lora_[AB] miss its gradient by \d+\.\d% \(tolerance 1%\): it is used",
        ),
        (Recomputed, r"net\.first runs its forward pass again in the backward pass \(activation checkpointing\)"),
        (Flat, r"net\.\w+ receives 16 rows where the batch has 8: rows are not the first dimension"),
    ],
)
def test_rows_that_cannot_be_told_apart_end_the_measurement_and_not_the_run(
    net: type[nn.Module], reason: str, tmp_path: Path
) -> None:
    module = Own(net, rank=1)
    with pytest.warns(UserWarning, match=f"monitor measures nothing: it failed at step 0: {reason}"):
        monitor = fit(tmp_path, 24, 8, 1, module)
    assert not monitor.samples
    assert all(not layer._forward_hooks and layer.lora_watcher is None for layer in lora_layers(module).values())


class Parted(nn.Module):
    """A layer of a kind without per-row gradients, and a linear layer."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other, self.head = other, nn.Linear(4, 2)


def compiled() -> nn.Module:
    net = nn.Linear(4, 4)
    net.compile(backend="eager")
    return net


def checkpointing() -> nn.Module:
    net = tiny_models.llama()
    # The newer name first, because transformers warns of the older one.
    newer = getattr(net, "activation_checkpointing_enable", None)
    (net.gradient_checkpointing_enable if newer is None else newer)()
    return net.train()


@pytest.mark.parametrize(
    ("other", "settings", "reason"),
    [
        (lambda: nn.Embedding(8, 4), {"targets": ["other"]}, r"layers only, and other\.lora_A is trained too"),
        (lambda: nn.Conv1d(4, 4, 2), {"targets": ["other"]}, r"layers only, and other\.lora_A is trained too"),
        (lambda: nn.LSTM(4, 4, batch_first=True), {"targets": ["other"]}, r"other\.weight_ih_l0_lora_A is trained too"),
        (lambda: nn.Linear(4, 4), {"targets": ["other"], "trainable": ["head"]}, r"head\.weight is trained too"),
        (
            lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            {"targets": ["other.out_proj"]},
            r"other\.out_proj\.lora_A is trained too",
        ),
        (lambda: nn.GRU(4, 4), {"targets": ["head"]}, r"other has batch_first=False, so rows are not the first"),
        (compiled, {"targets": ["head"]}, r"other is compiled, which skips forward hooks"),
        (checkpointing, {"targets": ["head"]}, r"other\.model\S* runs its forward pass again in the backward pass"),
    ],
)
def test_what_has_no_gradient_by_rows_is_named(
    other: Callable[[], nn.Module], settings: dict[str, Any], reason: str
) -> None:
    module = Parted(other())
    inject_lora(module, LoRAConfig(rank=1, **settings))
    with pytest.raises(ConfigError, match=reason):
        row_layers(module, [p for p in module.parameters() if p.requires_grad])


def test_the_way_out_is_told_at_the_start(tmp_path: Path) -> None:
    """A head is trained in full, and each step is one micro-batch."""
    module = Own(lambda: toys.Net(), targets=["first"], trainable=["second"])
    with pytest.warns(
        UserWarning,
        match=r"a step is one micro-batch, and its rows cannot be compared: per-row gradients exist for adapted linear "
        r"layers only, and net\.second\.weight is trained too\. Set accumulate_grad_batches=2 with half the batch",
    ):
        assert not fit(tmp_path, 8, 4, 1, module).samples
