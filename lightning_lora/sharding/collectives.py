"""What any rank has found, all ranks know."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor


def largest_of_ranks(trainer: Trainer, numbers: Tensor) -> Tensor:
    """The largest value that any rank has in each place; a collective, so all ranks must call it.

    One all-reduce: Lightning's ``strategy.reduce`` adds a barrier.
    """
    return _over_ranks(trainer, numbers, dist.ReduceOp.MAX)


def total_of_ranks(trainer: Trainer, numbers: Tensor) -> Tensor:
    """The sum over ranks in each place; a collective."""
    return _over_ranks(trainer, numbers, dist.ReduceOp.SUM)


def on_no_rank(trainer: Trainer, names: Iterable[str], missing: Container[str]) -> list[str]:
    """Those of ``names``, the same on all ranks, that every rank counts as ``missing``; a collective."""
    names = list(names)
    found = largest_of_ranks(trainer, torch.tensor([name not in missing for name in names]).int())
    return [name for name, is_found in zip(names, found.tolist(), strict=True) if not is_found]


def of_every_rank(own: Any) -> list[Any]:
    """``own`` of every rank in order, on rank 0; empty on the others, which write no file. All must call."""
    if not dist.is_initialized():
        return [own]
    is_first = dist.get_rank() == 0
    everyone: list[Any] | None = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(own, everyone)
    return everyone or []


def _over_ranks(trainer: Trainer, numbers: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if trainer.world_size == 1:
        return numbers
    numbers = numbers.to(trainer.strategy.root_device, copy=True)
    dist.all_reduce(numbers, op=operation)
    return numbers
