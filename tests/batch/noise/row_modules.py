"""Modules whose rows are measured in a step of one micro-batch: a transformer, and any network in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora import LoRAConfig
from lightning_lora.mixin.lora_mixin import LoRAMixin
from tests.support import tiny_models
from tests.support.monitored import FrozenRate

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_models.llama(attn_implementation="eager"),
    "gpt2": lambda: tiny_models.gpt2(attn_implementation="eager"),
}


class Language(LoRAMixin, LightningModule):
    """A transformer of two blocks; the loss of a batch is the mean of the losses of its rows."""

    def __init__(self, kind: str, dtype: torch.dtype, dropout: float) -> None:
        super().__init__()
        self.kind, self.dtype_wanted = kind, dtype
        self.lora = LoRAConfig(rank=3, dropout=dropout)

    def configure_model(self) -> None:
        self.net = MODELS[self.kind]().train()
        self.apply_lora()
        tiny_models.wake(self.net)
        self.net.to(self.dtype_wanted)

    def row_losses(self, tokens: Tensor) -> Tensor:
        torch.manual_seed(7)
        scores = self.net(tokens).logits[:, :-1]
        return F.cross_entropy(scores.mT, tokens[:, 1:], reduction="none").mean(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.row_losses(batch[0]).mean()

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


def squared_errors(module: Any, batch: list[Tensor]) -> Tensor:
    x, y = (part.double() for part in batch)
    return (module.net(x) - y).square().flatten(1).mean(1)


class Own(FrozenRate):
    """Trains a network of the test in double precision at rate zero."""

    def __init__(self, net: Callable[[], nn.Module], **settings: Any) -> None:
        super().__init__()
        self.lora = LoRAConfig(**{"rank": 2, "targets": "all"} | settings)
        self.make = net

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.net = self.make()
        self.apply_lora()
        tiny_models.wake(self.net, size=0.5)
        self.double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        torch.manual_seed(7)
        return super().training_step(batch, batch_idx)
