"""Modules and settings for the tests of adapter operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, inject_lora
from tests.support.tiny_models import TOKENS, gpt2, llama, wake

ALL = LoRAConfig(rank=4)

WITH_TABLES = LoRAConfig(rank=4, adapt_head=True, adapt_embeddings=True)


class Doubled(nn.Linear):
    """A user's layer; at module level, so that pickle finds it."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        self.calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


class Mixed(nn.Module):
    """An embedding, a transposed linear, a plain linear and a user's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=0)
        self.own = Doubled(8, 6)
        self.transposed = Conv1D(5, 6)
        self.plain = nn.Linear(5, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.plain(torch.tanh(self.transposed(torch.tanh(self.own(self.table(rows))))))


ROWS = torch.tensor([[0, 1, 5, 10], [3, 3, 0, 9]])

BUILDS: dict[str, tuple[Callable[[], nn.Module], Tensor, LoRAConfig]] = {
    "llama": (llama, TOKENS, WITH_TABLES),
    "gpt2": (gpt2, TOKENS, ALL),
    "mixed": (Mixed, ROWS, LoRAConfig(rank=2, adapt_embeddings=True)),
    "rslora": (Mixed, ROWS, LoRAConfig(rank=2, adapt_embeddings=True, scaling="rslora", rank_pattern={"plain": 3})),
}

every_build = pytest.mark.parametrize("name", BUILDS)


def adapted(name: str, awake: bool = True) -> tuple[nn.Module, Tensor]:
    """The adapted module called ``name`` and its inputs; ``awake`` gives the factors random values."""
    torch.manual_seed(0)
    build, inputs, config = BUILDS[name]
    module = build().eval()
    inject_lora(module, config)
    if awake:
        wake(module)
    return module, inputs


def output(module: nn.Module, inputs: Tensor) -> Tensor:
    """The output or the logits of ``module``, without gradients."""
    with torch.no_grad():
        found = module(inputs)
    return getattr(found, "logits", found)
