"""Modules of six kinds, as their users write them, and the lines that adapting them changes."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lightning_lora import lora_layers
from tests.support import toys

pytestmark = toys.expected_warnings

HEAD = """
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
"""
TAIL = """
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)
"""
KINDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "regression": (
        """
class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - batch[:, :2]).square().mean()
"""
        + TAIL,
        (6,),
    ),
    "convolutions": (
        """
class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.body(batch)), batch.flatten(1).argmax(1) % 3)
"""
        + TAIL,
        (1, 8, 8),
    ),
    "recurrence": (
        """
class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        return (self.head(self.lstm(batch[:, :-1])[0]) - batch[:, 1:]).square().mean()
"""
        + TAIL,
        (5, 4),
    ),
    "attention": (
        """
class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def training_step(self, batch, batch_idx):
        return (self.body(batch) - batch.flip(1)).square().mean()
"""
        + TAIL,
        (5, 8),
    ),
    "a model of transformers": (
        """
from transformers import BertConfig, BertForSequenceClassification


class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
        self.model = BertForSequenceClassification(BertConfig(**sizes, hidden_dropout_prob=0.0))

    def training_step(self, batch, batch_idx):
        tokens = batch.abs().mul(10).long() % 20
        return self.model(input_ids=tokens, labels=tokens[:, 0] % 2).loss
"""
        + TAIL,
        (6,),
    ),
    "two optimizers by hand": (
        """
class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.maker = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
        self.judge = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        for optimizer, sign in zip(self.optimizers(), (1, -1)):
            optimizer.zero_grad()
            self.manual_backward(sign * self.judge(self.maker(batch)).mean())
            optimizer.step()

    def configure_optimizers(self):
        parts = (self.maker, self.judge)
        return [torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=1e-2) for part in parts]
""",
        (6,),
    ),
}


def adapted(source: str) -> str:
    """The source with LoRA: an import, a base class, and the settings."""
    source = source.replace("import torch\n", "import torch\nfrom lightning_lora import LoRAConfig, LoRAMixin\n", 1)
    settings = "class Mine(LoRAMixin, LightningModule):\n    lora = LoRAConfig(rank=2)"
    return source.replace("class Mine(LightningModule):", settings)


def defined(source: str) -> LightningModule:
    scope: dict[str, Any] = {"__name__": "mine"}
    exec(source, scope)
    return scope["Mine"]()


def train(module: LightningModule, shape: tuple[int, ...], folder: Path) -> None:
    rows: Any = torch.randn(8, *shape)
    toys.trainer(folder).fit(module, DataLoader(rows, batch_size=4))


@pytest.mark.parametrize("kind", KINDS)
def test_three_changed_lines_adapt_a_module(kind: str, tmp_path: Path) -> None:
    source, shape = HEAD + KINDS[kind][0], KINDS[kind][1]
    after = adapted(source)
    changes = [line for line in difflib.ndiff(source.splitlines(), after.splitlines()) if line[0] == "+"]
    assert len(changes) <= 3, changes
    torch.manual_seed(0)
    plain = defined(source)
    torch.manual_seed(0)
    module = defined(after)
    before = toys.snapshot(plain)
    train(module, shape, tmp_path)
    assert lora_layers(module)
    assert all(toys.moved(module))
    assert toys.same(toys.base_of(module), before), "the base has moved"


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_lines_it_is_trained_in_full(kind: str, tmp_path: Path) -> None:
    """The modules are ones that train by themselves."""
    module = defined(HEAD + KINDS[kind][0])
    before = toys.snapshot(module)
    train(module, KINDS[kind][1], tmp_path)
    assert not toys.same(toys.snapshot(module), before)
