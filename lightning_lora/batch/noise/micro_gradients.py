r"""Square norms of the gradients of a step's micro-batches, which accumulation and data parallelism make anyway.

What arrives in ``p.grad`` is the sum over the micro-batches of a step, averaged over ranks. Where each rank holds whole
parameters a hook on the leaf sees every summand before any rank's is averaged in (``num_ranks * accumulation``
micro-batches); under FSDP2 leaf hooks are never called, and the growth of ``p.grad`` from one backward pass to the next
is a micro-batch of all ranks. At most one adapter-sized copy of gradients is kept, on one device until a pass is over.

Gradients are scaled by loss scalers, by accumulation and by losses that are sums over tokens. All three are undone, so
that steps of different sizes can be averaged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_lora.batch.noise.step_sample import StepSample, step_samples
from lightning_lora.errors import ConfigError
from lightning_lora.lora.shards import local_shard

Metric = Callable[[nn.Parameter, Tensor], Tensor]
"""Another measure of a gradient than itself, such as `OptimizerMetric`; linear, and standing still within a step."""


class MicroGradients(ABC):
    """Measures one optimizer step at a time: `start`, then `add` after each backward pass, then `finish`.

    Args:
        parameters: What is trained.
        group: The data-parallel ranks; None on one device.
        metrics: Measures to take beside the gradient itself, by name.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: ProcessGroup | None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.group = group
        self.metrics = dict(metrics or {})
        # Of each micro-batch (spaces, samples): most are one sample.
        self._squares: list[Tensor] = []
        self._rows: list[float] = []

    @property
    def num_ranks(self) -> int:
        """Data-parallel ranks."""
        return torch.distributed.get_world_size(self.group) if self.group is not None else 1

    @property
    def num_added(self) -> int:
        """Micro-batches of this rank since `start`."""
        return len(self._squares)

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
        squares = self._latest(num_rows)
        num_samples = squares.shape[1]
        self._squares.append(squares / loss_scale**2)
        self._rows += [num_rows / num_samples] * num_samples

    def share_rows(self, num_passes: Sequence[int]) -> None:
        """Say of each micro-batch among how many backward passes its rows were divided."""
        self._rows = [rows / passes for rows, passes in zip(self._rows, num_passes, strict=True)]

    def finish(self, weighted_by_rows: bool, unit: float) -> dict[str, StepSample]:
        """The sample of the step by space, at the latest before gradients are clipped.

        Left out is what is not finite, and everything if fewer than two micro-batches are independent.

        Args:
            weighted_by_rows: Whether the loss of a micro-batch is a sum (over rows, or their tokens), so that large
                micro-batches count more. False: means, which count the same.
            unit: What the gradient of the step is multiplied by to be a mean, the same on all ranks.
        """
        self.stop()
        squares, rows = self._gather(torch.cat(self._squares, 1), torch.tensor(self._rows, dtype=torch.float64))
        mean_squares = self._sum_over_shards(self._square([(p, p.grad) for p in self.parameters if p.grad is not None]))
        if len(rows) < 2:
            return {}
        weights = rows / rows.sum() if weighted_by_rows else torch.full_like(rows, 1 / len(rows))
        spaces = ("adapter", *self.metrics)
        return step_samples(spaces, squares, mean_squares, rows, weights, self._averaged_ranks, unit)

    @property
    def _averaged_ranks(self) -> int:
        """Ranks over which ``p.grad`` averages summands that are noted one by one."""
        return 1

    @abstractmethod
    def _latest(self, num_rows: int) -> Tensor:
        """Square norms ``(spaces, samples)`` of what the latest micro-batch has added."""

    def _gather(self, squares: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Both for every independent sample of the step, which may be on other ranks."""
        return squares, rows

    def _sum_over_shards(self, squares: Tensor) -> Tensor:
        return squares

    def _square(self, gradients: Sequence[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """``(spaces,)``: sums of squares, float64; of shards the own part."""
        own = [(parameter, local_shard(gradient).detach()) for parameter, gradient in gradients]
        spaces = [[gradient for _, gradient in own]]
        spaces += [[metric(*pair) for pair in own] for metric in self.metrics.values()]
        return torch.stack([_sum_of_squares(space) for space in spaces])


class LeafGradients(MicroGradients):
    """Where every rank holds whole parameters: one device, DDP."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: ProcessGroup | None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__(parameters, group, metrics)
        self._handles: list[RemovableHandle] = []
        self._parts: list[Tensor] = []
        self._whole: list[tuple[nn.Parameter, Tensor]] = []

    @override
    def start(self) -> None:
        super().start()
        self._parts, self._whole = [], []
        self._handles = [parameter.register_hook(partial(self._note, parameter)) for parameter in self.parameters]

    @override
    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._parts, self._whole = [], [], []

    def _note(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        if self.group is None:
            # All at once after the pass: one by one, small tensors cost their launches.
            self._whole.append((parameter, gradient))
        else:
            # Averaging over ranks may overwrite it.
            self._parts.append(self._square([(parameter, gradient)]))

    @override
    def _latest(self, num_rows: int) -> Tensor:
        count = len(self._parts) + len(self._whole)
        if count > len(self.parameters):
            raise ConfigError(
                f"{count} gradients of {len(self.parameters)} parameters came in one backward pass: "
                "activation checkpointing is reentrant; set use_reentrant=False, or take the batch-size monitor off."
            )
        if not count:
            raise ConfigError("no gradient reached the batch-size monitor in a backward pass of a measured step.")
        parts = [*self._parts, *([self._square(self._whole)] if self._whole else [])]
        self._parts, self._whole = [], []
        return torch.stack(parts).sum(0)[:, None]

    @property
    @override
    def _averaged_ranks(self) -> int:
        return self.num_ranks

    @override
    def _gather(self, squares: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.group is None:
            return squares, rows
        own = torch.cat([squares, rows.to(squares.device)[None]])
        everyone = [torch.empty_like(own) for _ in range(self.num_ranks)]
        torch.distributed.all_gather(everyone, own, group=self.group)
        together = torch.cat(everyone, 1)
        return together[:-1], together[-1].cpu()


def _sum_of_squares(parts: Sequence[Tensor]) -> Tensor:
    norms = torch._foreach_norm([part.float() if part.element_size() < 4 else part for part in parts])
    return torch.stack([norm.double() for norm in norms]).square().sum()
