"""What any rank has found, all ranks know."""

from __future__ import annotations

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor


def largest_of_ranks(trainer: Trainer, numbers: Tensor) -> Tensor:
    """The largest value that any rank has in each place; a collective, so all ranks must call it.

    One all-reduce: Lightning's ``strategy.reduce`` adds a barrier.
    """
    if trainer.world_size == 1:
        return numbers
    numbers = numbers.to(trainer.strategy.root_device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers
