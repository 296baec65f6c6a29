"""Finding NaN and infinity in many tensors on all ranks at once, and in the trained weights."""

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


def infinite_on_any_rank(trainer: Trainer, tensors: Sequence[Tensor]) -> Tensor:
    """One integer on the device: not 0 if tensors of any rank may hold NaN or infinity. A collective.

    Each tensor must then still be checked: it may be only their norm that overflows.

    Args:
        tensors: Local tensors of this rank; may be empty on some ranks.
    """
    # The 2-norm is the fastest sum that keeps NaN and infinity, and gives one number to wait for.
    is_wrong = ~get_total_norm(list(tensors)).isfinite() if tensors else torch.tensor(False)
    return largest_of_ranks(trainer, is_wrong.int())


def trained_weights(module: LightningModule) -> dict[str, Tensor]:
    """The part of each trained weight on this rank, by name."""
    return {name: local_shard(p.detach()) for name, p in module.named_parameters() if p.requires_grad}


def check_finite_weights(trainer: Trainer, module: LightningModule) -> None:
    """Stop all ranks if a trained weight on any rank is not finite. A collective: all ranks must call.

    Raises:
        GuardError: With the names of the weights.
    """
    if not lora_layers(module):
        return
    weights = trained_weights(module)
    if not infinite_on_any_rank(trainer, list(weights.values())):
        return
    names = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    # If only the norm overflowed, no rank has found a weight.
    if bool(largest_of_ranks(trainer, torch.tensor(len(names)))):
        raise GuardError(
            f"{len(names)} trained weights{'' if names else ' of this rank, but some of another one,'} are NaN or "
            f"infinite after optimizer step {trainer.global_step}{f': {first_five(names)}' if names else ''}. The "
            f"loss need not show it. They were written to no checkpoint: continue from the last one with a lower "
            f"learning rate, and check the batches before this step."
        )


def local_values(tensor: Tensor) -> Tensor:
    """The values of a gradient on this rank, as a dense tensor."""
    tensor = local_shard(tensor)
    return tensor.coalesce().values() if tensor.is_sparse else tensor
