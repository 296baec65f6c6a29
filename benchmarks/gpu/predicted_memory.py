"""Memory of the steps in docs/evidence/gpu.md, predicted by a trace on a CPU, beside the peaks measured there.

python -m benchmarks.gpu.predicted_memory    # prints the table of docs/understand/plan.md; needs no GPU
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.contenders import fused_adamw
from benchmarks.gpu.contenders import PROJECTIONS, unwrapped_loss_at_head
from benchmarks.gpu.models import LLAMAS
from benchmarks.workloads import Batch, Loss, next_token_loss
from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.memory.step_trace import trace_step


@dataclass(frozen=True)
class Case:
    """A step of `benchmarks.gpu.steps`.

    Args:
        size: The model.
        rows: Rows of 2,048 tokens.
        adapt: What is done to the model, which has frozen weights.
        measured: GiB above the base weights on the H100.
        layers: Fewer layers than the model has.
        loss: How the loss is computed.
    """

    size: str
    rows: int
    adapt: Callable[[nn.Module], nn.Module]
    measured: float
    layers: int | None = None
    loss: Loss = field(default=next_token_loss)


class Step(LightningModule):
    """The training step of a case, in bfloat16."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.model, self.held = case, None, 0

    def configure_model(self) -> None:
        """Build the model."""
        hidden, inner, depth, heads, kv_heads = LLAMAS[self.case.size]
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=self.case.layers or depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            use_cache=False,
            tie_word_embeddings=self.case.size != "8b",
            max_position_embeddings=32768,
        )
        base = nn.Module.to(LlamaForCausalLM(config), torch.bfloat16).requires_grad_(False).train()
        self.model = self.case.adapt(base)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of the case."""
        assert self.model is not None
        return self.case.loss(self.model, Batch(batch, batch.clone()))

    def configure_optimizers(self) -> Any:
        """AdamW of all that trains, as in the measured steps."""
        return fused_adamw([parameter for parameter in self.parameters() if parameter.requires_grad])


def full(model: nn.Module) -> nn.Module:
    """Full fine-tuning."""
    return model.requires_grad_(True)


def ours(model: nn.Module, **settings: Any) -> nn.Module:
    """LoRA on every layer."""
    options: dict[str, Any] = {"rank": 16} | settings
    inject_lora(model, LoRAConfig(**options))
    return model


def with_peft(model: Any, rank: int = 16, dropout: float = 0.0, autocast: bool = True) -> nn.Module:
    """PEFT's LoRA on every layer."""
    config = peft.LoraConfig(r=rank, lora_alpha=32, lora_dropout=dropout, target_modules=PROJECTIONS)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)


def _with(function: Callable[..., nn.Module], **settings: Any) -> Callable[[nn.Module], nn.Module]:
    return functools.partial(function, **settings)


CASES = {
    "1B, ours, loss at the head": Case("1b", 4, ours, 9.1, loss=unwrapped_loss_at_head),
    "1B, ours": Case("1b", 4, ours, 22.1),
    "1B, ours, adapters in bfloat16": Case("1b", 4, _with(ours, adapter_dtype="bfloat16"), 22.1),
    "1B, ours, dropout 0.1": Case("1b", 4, _with(ours, dropout=0.1), 22.3),
    "1B, PEFT": Case("1b", 4, with_peft, 33.1),
    "1B, PEFT, no autocast": Case("1b", 4, _with(with_peft, autocast=False), 26.1),
    "1B, PEFT, dropout 0.1": Case("1b", 4, _with(with_peft, dropout=0.1), 35.6),
    "1B, full fine-tuning, with weights": Case("1b", 4, full, 34.0),
    "eight layers of 8B, ours": Case("8b", 4, ours, 8.9, 8, unwrapped_loss_at_head),
    "eight layers of 8B, PEFT": Case("8b", 4, with_peft, 19.0, 8, unwrapped_loss_at_head),
    "eight layers of 8B, PEFT, no autocast": Case(
        "8b", 4, _with(with_peft, autocast=False), 12.1, 8, unwrapped_loss_at_head
    ),
    "eight layers of 8B, full, with weights": Case("8b", 4, full, 33.1, 8, unwrapped_loss_at_head),
    "8B, ours, rank 64": Case("8b", 2, _with(ours, rank=64), 18.6, loss=unwrapped_loss_at_head),
    "8B, PEFT, no autocast, rank 64": Case(
        "8b", 2, _with(with_peft, rank=64, autocast=False), 24.3, loss=unwrapped_loss_at_head
    ),
}


def predicted(case: Case) -> float:
    """GiB above the base weights, or in all where these are trained themselves."""
    memory = trace_step(Step(case), torch.zeros(case.rows, 2048, dtype=torch.long)).memory
    return (memory.total - (0 if case.adapt is full else memory.weights)) / 2**30


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    print("| step | predicted, GiB | measured, GiB | error |\n|---|---|---|---|")
    for name, case in CASES.items():
        found = predicted(case)
        print(f"| {name} | {found:.1f} | {case.measured} | {found / case.measured - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
