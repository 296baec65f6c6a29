"""Measures micro-batches where each rank holds a shard of each parameter: FSDP2.

Each backward pass ends in a reduction over ranks, so the micro-batches of all ranks together are one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.batch.noise.micro_gradients import MicroGradients
from lightning_lora.errors import MeasurementError
from lightning_lora.lora.shards import local_shard


class ShardedGradients(MicroGradients):
    """Samples are what each backward pass adds to ``p.grad``, which must be in float32 or float64."""

    _before: Sequence[Tensor | None] = ()

    @override
    def start(self) -> None:
        super().start()
        self._before = [None] * len(self.parameters)

    @override
    def stop(self) -> None:
        self._before = ()

    @override
    def _latest(self, num_rows: int) -> Tensor:
        now = [None if p.grad is None else local_shard(p.grad).clone() for p in self.parameters]
        growth = [
            (parameter, after if before is None else after - before)
            for parameter, after, before in zip(self.parameters, now, self._before, strict=True)
            if after is not None
        ]
        self._before = now
        if not growth:
            raise MeasurementError("no gradient reached the batch-size monitor in a backward pass of a measured step.")
        return self._square(growth)[:, None]

    @override
    def _gather(self, squares: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._sum_over_shards(rows.to(squares.device)).cpu()
        return self._sum_over_shards(squares), rows

    @override
    def _sum_over_shards(self, squares: Tensor) -> Tensor:
        if self.group is not None:
            squares = squares.clone()
            torch.distributed.all_reduce(squares, group=self.group)
        return squares
