"""Which settings of a run to lower after it ran out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_lora.batch.trial_step import is_out_of_memory
from lightning_lora.effective_batch import loader_batch_size
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.mixin.lora_mixin import LoRAMixin


class MemoryAdvice(Callback):
    """Adds to an out-of-memory error where the run was and the three settings whose lowering helps most.

    Only settings that this run can lower are named: not the batch size of a batch of one row, not the precision of a
    run in bfloat16. The rank is never named: adapters and their optimizer state are small beside activations.
    """

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Complete the message of the error, which is raised further."""
        if not is_out_of_memory(exception):
            return
        advice = [f"  {number}. {text}" for number, text in enumerate(islice(_advice(trainer, pl_module), 3), 1)]
        first, *more = exception.args or ("out of memory",)
        text = "\n".join(
            [str(first), "", f"Out of memory {_place(trainer, pl_module)}. Lower, in this order:", *advice]
        )
        exception.args = (text, *more)


def _place(trainer: Trainer, module: LightningModule) -> str:
    stage = "in validation after" if trainer.validating else "in"
    step = trainer.global_step + (0 if trainer.validating else 1)
    if module.device.type != "cuda":
        return f"{stage} optimizer step {step}"
    peak, total = torch.cuda.max_memory_allocated(module.device), torch.cuda.mem_get_info(module.device)[1]
    return f"{stage} optimizer step {step}, at a peak of {peak / 1e9:.1f} of {total / 1e9:.1f} GB"


def _advice(trainer: Trainer, module: LightningModule) -> Iterator[str]:
    """Settings to lower, the one that helps most first."""
    yield from _smaller_batches(trainer)
    adapted = bool(lora_layers(module))
    if isinstance(module, LoRAMixin) and not adapted:
        yield "lora: full fine-tuning -> LoRA; gradients and optimizer state of the base, 12 bytes a weight, are gone"
    narrower = {"32-true": "half of weights and activations", "bf16-mixed": "half of the weights"}
    if trainer.precision in narrower and module.hparams.get("dtype") is None:
        yield f"trainer.precision: {trainer.precision} -> bf16-true; {narrower[trainer.precision]}"
    if any(_could_recompute(child) for child in module.modules()):
        yield (
            "activation checkpointing: off -> gradient_checkpointing_enable() on the model, in configure_model; "
            "activations are computed twice instead of kept"
        )
    if adapted and module.hparams.get("quantization", "no such setting") is None and trainer.world_size == 1:
        yield "quantization: none -> nf4; the base takes a quarter of its 16-bit size"
    yield "the model: a smaller one, or more devices that share it (cli_configs/strategy/fsdp2.yaml)"


def _smaller_batches(trainer: Trainer) -> Iterator[str]:
    rows = loader_batch_size(trainer.val_dataloaders if trainer.validating else trainer.train_dataloader)
    if rows is not None and rows > 1:
        steps = trainer.accumulate_grad_batches
        yield (
            f"batch_size: {rows} -> {rows // 2}; with trainer.accumulate_grad_batches {steps} -> {steps * 2} the "
            f"optimizer step stays as large"
        )
    # A data module of the user's may have the setting too.
    length = getattr(getattr(trainer, "datamodule", None), "max_length", None)
    if isinstance(length, int):
        yield f"max_length: {length} -> {length // 2} tokens; activations shrink with it, long rows are cut"


def _could_recompute(module: Any) -> bool:
    """Whether a transformers model could compute activations again in the backward pass, and does not yet."""
    if getattr(module, "supports_gradient_checkpointing", False) is not True:
        return False
    # The newer name first: transformers warns of the older one.
    newer = getattr(module, "is_activation_checkpointing", None)
    return not (module.is_gradient_checkpointing if newer is None else newer)
