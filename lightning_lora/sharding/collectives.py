"""Collective operations: all ranks combine what each of them has found."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor


def largest_of_ranks(trainer: Trainer, numbers: Tensor) -> Tensor:
    """Elementwise maximum of ``numbers`` over all ranks; every rank must call it.

    It is one all-reduce; Lightning's ``strategy.reduce`` adds a barrier.
    """
    return _all_reduce(trainer, numbers, dist.ReduceOp.MAX)


def total_of_ranks(trainer: Trainer, numbers: Tensor) -> Tensor:
    """Elementwise sum of ``numbers`` over all ranks; every rank must call it."""
    return _all_reduce(trainer, numbers, dist.ReduceOp.SUM)


def missing_on_all_ranks(trainer: Trainer, names: Iterable[str], missing: Container[str]) -> list[str]:
    """Select the names that are in ``missing`` on every rank; every rank must call it, with the same ``names``."""
    names = list(names)
    found = largest_of_ranks(trainer, torch.tensor([name not in missing for name in names]).int())
    return [name for name, is_found in zip(names, found.tolist(), strict=True) if not is_found]


def gather_on_rank_zero(own: Any) -> list[Any]:
    """Gather ``own`` of every rank on rank 0, in the order of ranks; an empty list on the others. All must call it."""
    if not dist.is_initialized():
        return [own]
    is_first = dist.get_rank() == 0
    everyone: list[Any] | None = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(own, everyone)
    return everyone or []


def _all_reduce(trainer: Trainer, numbers: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if trainer.world_size == 1:
        return numbers
    numbers = numbers.to(trainer.strategy.root_device, copy=True)
    dist.all_reduce(numbers, op=operation)
    return numbers
