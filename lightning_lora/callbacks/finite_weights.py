"""Trained weights that are not finite, which a loss need not show: fused attention keeps a NaN to itself."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_lora.errors import GuardError, first_five
from lightning_lora.layers.walk import lora_layers
from lightning_lora.parts import local_part

from .agreement import largest_of_ranks
from .finite import may_be_infinite


def check_finite_weights(trainer: Trainer, module: LightningModule) -> None:
    """Stop all ranks if a trained weight of any is not finite; all ranks must call.

    Raises:
        GuardError: Naming the weights.
    """
    if not lora_layers(module):
        return
    weights = {name: local_part(p.detach()) for name, p in module.named_parameters() if p.requires_grad}
    if not may_be_infinite(trainer, list(weights.values())):
        return
    names = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    # Of an overflow no rank has a name.
    if bool(largest_of_ranks(trainer, torch.tensor(len(names)))):
        raise GuardError(
            f"{len(names)} trained weights{'' if names else ' of this rank, but some of another one,'} are NaN or "
            f"infinite after optimizer step {trainer.global_step}{f': {first_five(names)}' if names else ''}. The "
            f"loss need not show it. No checkpoint of them was written: go on from the last one with a lower "
            f"learning rate, or look at the batches before this step."
        )
