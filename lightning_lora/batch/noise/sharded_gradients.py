"""Square norms of the gradients of micro-batches where every rank holds a part of each parameter.

Every backward pass ends in a reduction, so a micro-batch is one of all ranks together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import override

from lightning_lora.batch.noise.micro_gradients import Metric, MicroGradients
from lightning_lora.errors import ConfigError
from lightning_lora.lora.shards import local_shard


class ShardedGradients(MicroGradients):
    """Where parameters are in shards and every backward pass ends in their reduction: FSDP2."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: ProcessGroup | None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__(parameters, group, metrics)
        if narrow := {str(p.dtype) for p in parameters if p.dtype not in (torch.float32, torch.float64)}:
            raise ConfigError(
                f"trained parameters are {', '.join(sorted(narrow))}: what a micro-batch adds to such gradients is "
                "mostly rounding. Train adapters in float32 (adapter_dtype), or take the batch-size monitor off."
            )
        self._before: list[Tensor | None] = []

    @override
    def start(self) -> None:
        super().start()
        self._before = [None] * len(self.parameters)

    @override
    def stop(self) -> None:
        self._before = []

    @override
    def _latest(self, num_rows: int) -> Tensor:
        now = [None if p.grad is None else local_shard(p.grad).clone() for p in self.parameters]
        growth = [
            (parameter, after if before is None else after - before)
            for parameter, after, before in zip(self.parameters, now, self._before, strict=True)
            if after is not None
        ]
        self._before = [*now]
        if not growth:
            raise ConfigError("no gradient reached the batch-size monitor in a backward pass of a measured step.")
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
