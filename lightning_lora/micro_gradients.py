r"""Square norms of the gradients of a step's micro-batches, which accumulation and data parallelism make anyway.

What arrives in ``p.grad`` is the sum over the micro-batches of a step, averaged over ranks. Where each rank holds whole
parameters a hook on the leaf sees every summand before any rank's is averaged in (``num_ranks * accumulation``
micro-batches); under FSDP2 leaf hooks are never called, and the growth of ``p.grad`` from one backward pass to the next
is a micro-batch of all ranks. No gradient is copied in the first case, one adapter-sized copy is kept in the second.

Gradients are scaled by loss scalers, by accumulation and by losses that are sums over tokens. All three are undone, so
that steps of different sizes can be averaged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_lora.errors import ConfigError
from lightning_lora.functional.noise_scale import signal_and_trace


class StepSample(NamedTuple):
    """What one step says.

    Args:
        signal: Unbiased ``|G|^2``.
        trace: Unbiased ``tr(Sigma)`` of a row.
        num_rows: Rows of the step, all ranks.
        num_micro_batches: Independent ones among them.
    """

    signal: float
    trace: float
    num_rows: int
    num_micro_batches: int


class MicroGradients(ABC):
    """Measures one optimizer step at a time: `start`, then `add` after each backward pass, then `finish`.

    Args:
        parameters: What is trained.
        group: The data-parallel ranks; None on one device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: ProcessGroup | None) -> None:
        self.parameters = list(parameters)
        self.group = group
        self._squares: list[Tensor] = []
        self._rows: list[int] = []

    @property
    def num_ranks(self) -> int:
        """Data-parallel ranks."""
        return torch.distributed.get_world_size(self.group) if self.group is not None else 1

    @property
    def num_added(self) -> int:
        """Micro-batches of this rank since `start`."""
        return len(self._rows)

    def start(self) -> None:
        """Begin a step, before its first backward pass."""
        self._squares, self._rows = [], []

    @abstractmethod
    def stop(self) -> None:
        """Take off what `start` has put on."""

    def add(self, num_rows: int, loss_scale: float = 1.0) -> None:
        """Note the micro-batch whose backward pass is over.

        Args:
            num_rows: Rows of this rank in it.
            loss_scale: By which a scaler has multiplied its gradients.
        """
        self._squares.append(self._square() / loss_scale**2)
        self._rows.append(num_rows)

    def finish(self, weighted_by_rows: bool, unit: float) -> StepSample | None:
        """The sample of the step, at the latest before gradients are clipped; None if fewer than two are independent.

        Args:
            weighted_by_rows: Whether the loss of a micro-batch is a sum (over rows, or their tokens), so that large
                micro-batches count more. False: means, which count the same.
            unit: What the gradient of the step is multiplied by to be a mean, the same on all ranks.
        """
        self.stop()
        squares, rows = self._gather(torch.stack(self._squares), torch.tensor(self._rows, dtype=torch.float64))
        mean_square = self._sum_over_shards(_square([p.grad for p in self.parameters if p.grad is not None]))
        count, total = len(squares), rows.sum()
        if count < 2:
            return None
        weights = rows / total if weighted_by_rows else torch.full_like(rows, 1 / count)
        # The weighted mean of the micro-batches' own gradients is what the optimizer gets.
        factor = 1 / (weights * self._averaged_ranks)
        signal, trace = signal_and_trace(squares.cpu() * factor.square(), mean_square.cpu(), rows, weights)
        return StepSample(float(signal) * unit**2, float(trace) * unit**2, int(total), count)

    @property
    @abstractmethod
    def _averaged_ranks(self) -> int:
        """Ranks over which ``p.grad`` averages summands that are noted one by one."""

    @abstractmethod
    def _square(self) -> Tensor:
        """Square norm of the latest micro-batch."""

    @abstractmethod
    def _gather(self, squares: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Both for every independent micro-batch of the step."""

    def _sum_over_shards(self, square: Tensor) -> Tensor:
        return square


class LeafGradients(MicroGradients):
    """Where every rank holds whole parameters: one device, DDP."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: ProcessGroup | None) -> None:
        super().__init__(parameters, group)
        self._handles: list[RemovableHandle] = []
        self._parts: list[Tensor] = []

    @override
    def start(self) -> None:
        super().start()
        self._parts = []
        # The gradient is not kept: averaging over ranks may overwrite it.
        hook: Callable[[Tensor], None] = lambda gradient: self._parts.append(_square([gradient]))  # noqa: E731
        self._handles = [parameter.register_hook(hook) for parameter in self.parameters]

    @override
    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @override
    def _square(self) -> Tensor:
        if len(self._parts) > len(self.parameters):
            raise ConfigError(
                f"{len(self._parts)} gradients of {len(self.parameters)} parameters came in one backward pass: "
                "activation checkpointing is reentrant; set use_reentrant=False, or take the batch-size monitor off."
            )
        parts, self._parts = self._parts, []
        if not parts:
            raise ConfigError("no gradient reached the batch-size monitor in a backward pass of a measured step.")
        return torch.stack(parts).sum()

    @property
    @override
    def _averaged_ranks(self) -> int:
        return self.num_ranks

    @override
    def _gather(self, squares: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.group is None:
            return squares, rows
        own = torch.stack([squares, rows.to(squares.device)])
        everyone = [torch.empty_like(own) for _ in range(self.num_ranks)]
        torch.distributed.all_gather(everyone, own, group=self.group)
        squares, rows = torch.cat(everyone, 1)
        return squares, rows.cpu()


class ShardedGradients(MicroGradients):
    """Where parameters are in shards and every backward pass ends in their reduction: FSDP2."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: ProcessGroup | None) -> None:
        super().__init__(parameters, group)
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
    def _square(self) -> Tensor:
        now = [None if p.grad is None else _local(p.grad).clone() for p in self.parameters]
        growth = [
            after if before is None else after - before
            for after, before in zip(now, self._before, strict=True)
            if after is not None
        ]
        self._before = [*now]
        if not growth:
            raise ConfigError("no gradient reached the batch-size monitor in a backward pass of a measured step.")
        return _square(growth)

    @property
    @override
    def _averaged_ranks(self) -> int:
        return 1

    @override
    def _gather(self, squares: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._sum_over_shards(rows.to(squares.device)).cpu()
        return self._sum_over_shards(squares), rows

    @override
    def _sum_over_shards(self, square: Tensor) -> Tensor:
        if self.group is not None:
            square = square.clone()
            torch.distributed.all_reduce(square, group=self.group)
        return square


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _square(gradients: Sequence[Tensor]) -> Tensor:
    """Sum of squares, float64; of shards the own part."""
    parts = [_local(gradient).detach() for gradient in gradients]
    norms = torch._foreach_norm(
        [part.float() if part.dtype in (torch.float16, torch.bfloat16) else part for part in parts]
    )
    return torch.stack([norm.double() for norm in norms]).square().sum()
