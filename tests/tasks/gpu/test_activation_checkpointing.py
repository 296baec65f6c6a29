"""Blocks that are computed again in the backward pass: one setting, the same numbers, less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import ConfigError, LoRAConfig
from lightning_lora.memory.step_trace import trace_step
from lightning_lora.tasks import CausalLM
from tests.support import packed, tiny_models, toys
from tests.tasks.conftest import fit, token_loader

pytestmark = toys.expected_warnings
DEEP: dict[str, Any] = {"num_hidden_layers": 4, "intermediate_size": 96}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


class Watched(CausalLM):
    """Keeps losses and gradients of its steps, and counts the products of a backward pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []
        self.products = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen.append(loss.detach())
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with Products() as products:
            super().backward(loss, *args, **kwargs)
        self.products = products.count

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self.seen += [p.grad.clone() for p in self.parameters() if p.grad is not None]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), LoRAConfig(rank=2, dropout=0.2), None])
def test_losses_and_gradients_are_equal_bit_for_bit(lora: Any, precision: str, tmp_path: Path) -> None:
    folder, runs = toys.save_llama(tmp_path / "model", **DEEP), []
    for asked in (False, True):
        torch.manual_seed(0)
        module = Watched(str(folder), 1e-3, lora=lora, activation_checkpointing=asked)
        fit(module, tmp_path, precision=precision)
        runs.append(module)
    plain, again = runs
    assert len(plain.seen) == len(again.seen) > 8
    assert all(torch.equal(one, other) for one, other in zip(plain.seen, again.seen, strict=True))
    assert again.products > plain.products


def test_a_step_takes_less_memory(tmp_path: Path) -> None:
    folder = toys.save_llama(tmp_path / "model", **DEEP)
    batch = next(iter(token_loader(8)))
    kept, again = (
        trace_step(CausalLM(str(folder), lora=LoRAConfig(rank=2), activation_checkpointing=asked), batch).memory
        for asked in (False, True)
    )
    assert again.activations < 0.6 * kept.activations
    assert again.weights == kept.weights


def test_a_model_that_cannot_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed.save(tiny_models.llama(), tmp_path / "model")
    module = CausalLM(str(folder), lora=LoRAConfig(rank=2), activation_checkpointing=True)
    monkeypatch.setattr("transformers.LlamaPreTrainedModel.supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match="transformers cannot recompute blocks of LlamaForCausalLM"):
        module.configure_model()
