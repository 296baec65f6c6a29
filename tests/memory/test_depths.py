"""A few of many equal blocks tell what all of them take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig
from lightning_lora.memory.equal_blocks import LEAST, equal_blocks
from lightning_lora.memory.failures import TraceError
from lightning_lora.memory.step_trace import StepTracer, trace_step
from lightning_lora.tasks.variants import variant
from tests.support import toys

pytestmark = [pytest.mark.slow, *toys.expected_warnings]


class Block(nn.Module):
    """A residual block with a number of its own, and experts if asked for."""

    def __init__(self, number: int, width: int, experts: int) -> None:
        super().__init__()
        self.number = number
        self.norm = nn.LayerNorm(width)
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(max(1, experts)))
        self.down = nn.Linear(2 * width, width)
        self.router = nn.Linear(width, experts) if experts else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.router is None:
            return x + self.down(self.up[0](y).relu())
        choice = self.router(y).argmax(-1)
        parts = [up(y[choice == number]) for number, up in enumerate(self.up)]
        return x + self.down(torch.cat(parts)[: len(x)].relu())


class Deep(LightningModule):
    """A stack of blocks between an embedding and a head."""

    def __init__(self, depth: int = LEAST, kind: str = "dense", width: int = 16, classes: int = 200) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(classes, width)
        self.layers = nn.ModuleList(Block(number, width, 2 if kind == "experts" else 0) for number in range(depth))
        self.head = nn.Linear(width, classes)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.embed(batch)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.kind == "checkpointed" else layer(x)
        return nn.functional.cross_entropy(self.head(x), batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


LORA = LoRAConfig(rank=2)
FAST = [("dense", None), ("checkpointed", LORA), ("experts", LORA)]
SLOW = [("dense", LORA), ("checkpointed", None), ("experts", None)]


@pytest.mark.parametrize(("kind", "lora"), [*FAST, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)])
def test_a_few_blocks_tell_what_all_take(kind: str, lora: Any) -> None:
    tracer = StepTracer(variant(Deep(kind=kind), lora), gradient_clip_val=1.0)
    # With few rows the gradients decide where the peak is, with many the activations and the head do.
    for rows in (1, 64):
        few, whole = tracer.trace(torch.arange(rows)), tracer.trace(torch.arange(rows), whole=True)
        assert few.depths
        assert not whole.depths
        assert (few.memory, few.flops) == (whole.memory, whole.flops)


def test_blocks_that_are_not_equal_are_traced_whole() -> None:
    batch = torch.arange(8)
    other = Deep()
    other.layers[7].register_buffer("mask", torch.ones(3))
    assert equal_blocks(other) is None
    assert equal_blocks(Deep(depth=LEAST - 1)) is None
    different = Deep()
    different.layers[7].__dict__["number"] = 100
    assert equal_blocks(different) is None
    assert not trace_step(different, batch).depths


class Uneven(Deep):
    """Equal blocks of which every second one is called with twice the rows."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.embed(batch)
        for number, layer in enumerate(self.layers):
            x = layer(torch.cat([x, x]))[: len(x)] if number % 2 else layer(x)
        return nn.functional.cross_entropy(self.head(x), batch)


def test_blocks_that_are_used_differently_are_traced_whole() -> None:
    batch = torch.arange(64)
    found = trace_step(Uneven(), batch)
    assert not found.depths
    assert found == trace_step(Uneven(), batch, whole=True)


@torch.library.custom_op("lightning_lora_tests::without_fake_kernel", mutates_args=())
def without_fake_kernel(x: Tensor) -> Tensor:
    return x.clone()


class Custom(Deep):
    """Uses an operation that cannot run without values."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return without_fake_kernel(self.embed(batch)).sum()


class Manual(toys.ByHand, Deep):
    """Optimizes by itself."""


class Narrow(Deep):
    """Changes its types while it is built."""

    def configure_model(self) -> None:
        self.layers.to(torch.bfloat16).double()
        self.bfloat16()


def test_a_module_may_change_its_types_while_it_is_built() -> None:
    narrow, wide = trace_step(Narrow(), torch.arange(8)).memory, trace_step(Deep(), torch.arange(8)).memory
    assert 2 * narrow.weights == wide.weights
    assert narrow.gradients < wide.gradients


class Unbuildable(Deep):
    """Reads numbers of its weights while it is built."""

    def configure_model(self) -> None:
        self.head.weight.detach().numpy()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Custom, ["a training step of Custom cannot be traced", "without_fake_kernel", "register_fake"]),
        (Manual, ["Manual optimizes by itself", "MemoryAdvice"]),
        (Unbuildable, ["building of Unbuildable cannot be traced"]),
    ],
)
def test_a_step_that_cannot_be_traced_is_one_error(module: Any, words: list[str]) -> None:
    with pytest.raises(TraceError) as error:
        trace_step(module(), torch.arange(8))
    assert all(word in str(error.value) for word in words)
