"""Who takes part: each contender turns a copy of the base into something that can be trained for one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.adapters import Adapter, shared_names
from benchmarks.char_gpt import CharGPT
from benchmarks.other_layers import LayerBuilder, linear_contender, litgpt_layer, microsoft_layer
from benchmarks.workloads import IGNORED, Batch, Loss, next_token_loss
from lightning_lora import inject_lora, load_lora_state_dict
from lightning_lora.batch_facts import BatchFacts
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.mixin.optim import parameter_groups
from lightning_lora.tasks.head_loss import head_loss

# Small enough that 30 steps change neither routing nor which numbers are denormal.
LEARNING_RATE = 1e-6


@dataclass
class Trainee:
    """A model ready to train.

    Args:
        model: What is called.
        optimizer: None where nothing is updated.
        gradients: Those of the factors after a backward, by PEFT's names; None where there are no adapters.
        loss: From the model and a batch; the usual one unless the contender brings its own.
    """

    model: nn.Module
    optimizer: Optimizer | None
    gradients: Callable[[], Mapping[str, Tensor]] | None = None
    loss: Loss = next_token_loss


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Args:
        name: In tables; a stand-in for a product says that it is one.
        adapt: Makes a `Trainee` of a base model, in place. Raises `NotApplicableError` where it cannot.
        trains_base: Whether it changes the base weights and so needs a copy of its own.
    """

    name: str
    adapt: Callable[[nn.Module, Adapter], Trainee]
    trains_base: bool = False


def fused_adamw(parameters: Any) -> AdamW:
    """The same optimizer for everyone: torch's fused AdamW."""
    return AdamW(parameters, lr=LEARNING_RATE, fused=True)


def full_fine_tuning(model: nn.Module, adapter: Adapter) -> Trainee:
    """All weights trained."""
    return Trainee(model, fused_adamw(model.requires_grad_(True).parameters()))


def floor(model: nn.Module, adapter: Adapter) -> Trainee:
    """What no LoRA step can undercut: frozen forward and the backward to the embedding's output; no optimizer."""
    embedding: Any = model.requires_grad_(False).get_input_embeddings()  # pyright: ignore[reportCallIssue]
    embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return Trainee(model, None)


def ours(model: nn.Module, adapter: Adapter, dropout: float = 0.0) -> Trainee:
    """``inject_lora`` and fused AdamW over ``parameter_groups``."""
    inject_lora(model, replace(adapter.config, dropout=dropout))
    load_lora_state_dict(model, adapter.factors)

    def gradients() -> Mapping[str, Tensor]:
        return shared_names(model, _gradients(factor_parameters(model)))

    return Trainee(model, fused_adamw(parameter_groups(model, LEARNING_RATE)), gradients)


def ours_with_dropout(model: nn.Module, adapter: Adapter) -> Trainee:
    """The same with dropout 0.1 on the update's input."""
    return ours(model, adapter, dropout=0.1)


def ours_with_our_loss(model: nn.Module, adapter: Adapter) -> Trainee:
    """`ours`, trained by `loss_at_head`."""
    return replace(ours(model, adapter), loss=loss_at_head)


def loss_at_head(
    model: nn.Module, batch: Batch, chunk_rows: int | None = None, facts: BatchFacts | None = None
) -> Tensor:
    """`next_token_loss` by `head_loss`, as docs/understand/loss.md writes it: from hidden states, without logits.

    With ``facts``, those of ``batch.labels``, it asks the device for nothing.
    """
    causal: Any = model
    is_plain = isinstance(model, CharGPT)
    hidden = causal.hidden(batch.input_ids) if is_plain else causal.get_decoder()(batch.input_ids).last_hidden_state
    if facts is not None:
        labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        return head_loss(hidden, causal.lm_head.weight, labels, divisor=facts.count, facts=facts)
    hidden, labels = hidden[:, :-1], batch.labels[:, 1:]
    divisor = (labels != IGNORED).sum()
    return head_loss(hidden, causal.lm_head.weight, labels, divisor=divisor, chunk_rows=chunk_rows)


def peft_lora(model: nn.Module, adapter: Adapter, autocast_adapter_dtype: bool = True) -> Trainee:
    """PEFT loads the adapter's folder; fused AdamW over what it leaves trainable."""
    folder = str(adapter.folder)
    wrapped = peft.PeftModel.from_pretrained(
        model,  # pyright: ignore[reportArgumentType]
        folder,
        is_trainable=True,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    factors = {name.replace(".default", ""): p for name, p in wrapped.named_parameters() if p.requires_grad}
    return Trainee(wrapped, fused_adamw(factors.values()), lambda: _gradients(factors))


def peft_without_autocast(model: nn.Module, adapter: Adapter) -> Trainee:
    """PEFT with the adapters in the type of the base."""
    return peft_lora(model, adapter, autocast_adapter_dtype=False)


def linear_lora(layer: LayerBuilder) -> Callable[[nn.Module, Adapter], Trainee]:
    """Another library's layer in place of each adapted ``nn.Linear``; fused AdamW over the factors."""

    def adapt(model: nn.Module, adapter: Adapter) -> Trainee:
        factors = linear_contender(model, adapter, layer)
        return Trainee(model, fused_adamw(factors.values()), lambda: _gradients(factors))

    return adapt


def _gradients(factors: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    # Experts that saw no token may be given no gradient.
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in factors.items()}


FULL, FLOOR, OURS, OUR_LOSS, PEFT = "FullFT", "floor", "ours", "ours, our loss", f"PEFT {peft.__version__}"


def contenders() -> dict[str, Contender]:
    """All of them, by name; products that are not installed are replaced by their formula, and called so."""
    litgpt_name, litgpt = litgpt_layer()
    microsoft_name, microsoft = microsoft_layer()
    everyone = [
        Contender(FULL, full_fine_tuning, trains_base=True),
        Contender(FLOOR, floor),
        Contender(OURS, ours),
        Contender(OUR_LOSS, ours_with_our_loss),
        Contender("ours, dropout 0.1", ours_with_dropout),
        Contender(PEFT, peft_lora),
        Contender(f"{PEFT}, autocast_adapter_dtype=False", peft_without_autocast),
        Contender(litgpt_name, linear_lora(litgpt)),
        Contender(microsoft_name, linear_lora(microsoft)),
    ]
    return {contender.name: contender for contender in everyone}
