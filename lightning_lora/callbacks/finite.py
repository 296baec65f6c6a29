"""A first look at many tensors for a value that is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm

from lightning_lora.errors import GuardError, first_five
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.shards import local_shard
from lightning_lora.sharding.collectives import largest_of_ranks


def may_be_infinite(trainer: Trainer, tensors: Sequence[Tensor]) -> bool:
    """Whether any rank's tensors may hold NaN or infinity; a collective. Look at each then: a norm alone may overflow.

    Args:
        trainer: Of the run.
        tensors: This rank's parts, of which some ranks may hold none.
    """
    # The 2-norm is the fastest sum over everything that keeps NaN and infinity, and one number to wait for.
    is_wrong = ~get_total_norm(list(tensors)).isfinite() if tensors else torch.tensor(False)
    return bool(largest_of_ranks(trainer, is_wrong.int()))


def check_finite_weights(trainer: Trainer, module: LightningModule) -> None:
    """Stop all ranks if a trained weight of any is not finite; all ranks must call.

    Raises:
        GuardError: Naming the weights.
    """
    if not lora_layers(module):
        return
    weights = {name: local_shard(p.detach()) for name, p in module.named_parameters() if p.requires_grad}
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
