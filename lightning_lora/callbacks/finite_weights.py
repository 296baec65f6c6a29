"""Trained weights that are not finite, which a loss need not show: fused attention keeps a NaN to itself."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from lightning_lora.errors import GuardError, first_five
from lightning_lora.layers.walk import lora_layers

from .agreement import largest_of_ranks


def check_finite_weights(trainer: Trainer, module: LightningModule) -> None:
    """Stop all ranks if a trained weight of any is not finite; all ranks must call.

    Raises:
        GuardError: Naming the weights.
    """
    if not lora_layers(module):
        return
    weights = {name: _local(p.detach()) for name, p in module.named_parameters() if p.requires_grad}
    # One number for the device to say; a norm may overflow by itself, so that each is looked at where it is not finite.
    is_wrong = ~get_total_norm(list(weights.values())).isfinite()
    if not bool(largest_of_ranks(trainer, is_wrong.int())):
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


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
