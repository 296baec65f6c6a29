r"""Square norms of the gradients of a step's micro-batches, which accumulation and data parallelism compute anyway.

``p.grad`` holds the sum over the micro-batches of a step, averaged over ranks. Where each rank holds whole parameters,
a hook on each parameter sees the gradient of a micro-batch before it is added and before ranks are averaged:
``num_ranks * accumulation`` samples. FSDP2 never calls such hooks; there the growth of ``p.grad`` from one backward
pass to the next is a sample of all ranks together. At most one copy of the adapters' gradients is kept: on one device,
until the pass is over.

Gradients are scaled by gradient scalers, by accumulation and by losses that are sums over tokens. All three factors are
divided out, so that steps of different sizes can be averaged.
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
from lightning_lora.errors import MeasurementError
from lightning_lora.lora.shards import local_shard

Metric = Callable[[nn.Parameter, Tensor], Tensor]
"""A linear map of gradients whose square norm is measured, such as `AdamMetric`; it must not change within a step."""


class MicroGradients(ABC):
    """Measures one optimizer step at a time: `start`, then `add` after each backward pass, then `finish`.

    Args:
        group: The data-parallel ranks; None on one device.
        metrics: Metrics to measure beside the gradient itself, by name.
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
        # Square norms (metrics, samples) of each micro-batch, which is one sample unless its rows are compared.
        self._squares: list[Tensor] = []
        self._rows: list[float] = []

    @property
    def num_ranks(self) -> int:
        """Number of data-parallel ranks."""
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
        """Remove the hooks of `start`."""

    def add(self, num_rows: int, loss_scale: float = 1.0) -> None:
        """Measure the micro-batch whose backward pass is over.

        Args:
            num_rows: Rows of the micro-batch on this rank.
            loss_scale: Factor of the gradient scaler.
        """
        squares = self._latest(num_rows)
        num_samples = squares.shape[1]
        self._squares.append(squares / loss_scale**2)
        self._rows += [num_rows / num_samples] * num_samples

    def share_rows(self, num_passes: Sequence[int]) -> None:
        """Divide the rows of each added micro-batch by the number of backward passes that shared them."""
        self._rows = [rows / passes for rows, passes in zip(self._rows, num_passes, strict=True)]

    def finish(self, weighted_by_rows: bool) -> dict[str, StepSample]:
        """The samples of the step by metric, after gradients are unscaled and before they are clipped; a collective.

        A metric that is not finite is left out, and all are if fewer than two samples are independent.

        Args:
            weighted_by_rows: Whether the loss of a micro-batch is a sum (over rows, or their tokens), so that large
                micro-batches weigh more. False: a mean, so that all weigh the same.
        """
        evidence = self._evidence()
        self.stop()
        squares, rows = self._gather(torch.cat(self._squares, 1), torch.tensor(self._rows, dtype=torch.float64))
        mean_squares = self._sum_over_shards(self._square([(p, p.grad) for p in self.parameters if p.grad is not None]))
        # One transfer: each would wait for the device.
        numbers = [squares.flatten(), mean_squares, evidence]
        own, mean_squares, evidence = torch.cat(numbers).cpu().split([len(part) for part in numbers])
        self._check(evidence)
        if len(rows) < 2:
            return {}
        weights = rows / rows.sum() if weighted_by_rows else torch.full_like(rows, 1 / len(rows))
        return step_samples(
            ("adapter", *self.metrics), own.view_as(squares), mean_squares, rows, shares=weights * self._averaged_ranks
        )

    @property
    def _averaged_ranks(self) -> int:
        """Ranks that are averaged in ``p.grad`` after their samples were taken."""
        return 1

    @abstractmethod
    def _latest(self, num_rows: int) -> Tensor:
        """Square norms ``(metrics, samples)`` of what the latest micro-batch has added to the gradient."""

    def _evidence(self) -> Tensor:
        """Numbers on the device, float64, by which `_check` tells whether the measurement is right."""
        return torch.zeros(0, dtype=torch.float64, device=self._squares[0].device)

    def _check(self, evidence: Tensor) -> None:
        """Raise `ConfigError` if the numbers, now on the host, show that something was not seen."""
        assert not len(evidence)

    def _gather(self, squares: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Square norms and rows of the samples of all ranks."""
        return squares, rows

    def _sum_over_shards(self, squares: Tensor) -> Tensor:
        return squares

    @torch.no_grad()
    def _square(self, gradients: Sequence[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """Sums of squares ``(metrics,)`` in float64, of this rank's shards."""
        own = [(parameter, local_shard(gradient)) for parameter, gradient in gradients]
        scaled = [[gradient for _, gradient in own]]
        scaled += [[metric(*pair) for pair in own] for metric in self.metrics.values()]
        return torch.stack([_sum_of_squares(parts) for parts in scaled])


class LeafGradients(MicroGradients):
    """Samples are the micro-batches of every rank, where each rank holds whole parameters: one device, DDP."""

    _handles: Sequence[RemovableHandle] = ()

    @override
    def start(self) -> None:
        super().start()
        self._clear()
        self._handles = [parameter.register_hook(partial(self._note, parameter)) for parameter in self.parameters]

    @override
    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        self._clear()

    def _clear(self) -> None:
        self._parts: list[Tensor] = []
        self._whole: list[tuple[nn.Parameter, Tensor]] = []

    def _note(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        if self.group is None:
            # All at once after the pass: for small tensors, one launch each is slow.
            self._whole.append((parameter, gradient))
        else:
            # At once: averaging over ranks may overwrite the gradient.
            self._parts.append(self._square([(parameter, gradient)]))

    @override
    def _latest(self, num_rows: int) -> Tensor:
        count = len(self._parts) + len(self._whole)
        if count > len(self.parameters):
            raise MeasurementError(
                f"{count} gradients of {len(self.parameters)} parameters came in one backward pass: "
                "activation checkpointing is reentrant; set use_reentrant=False, or remove the batch-size monitor."
            )
        if not count:
            raise MeasurementError("no gradient reached the batch-size monitor in a backward pass of a measured step.")
        parts = [*self._parts, *([self._square(self._whole)] if self._whole else [])]
        self._clear()
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
        of_ranks = [torch.empty_like(own) for _ in range(self.num_ranks)]
        torch.distributed.all_gather(of_ranks, own, group=self.group)
        together = torch.cat(of_ranks, 1)
        return together[:-1], together[-1].cpu()


def _sum_of_squares(parts: Sequence[Tensor]) -> Tensor:
    norms = torch._foreach_norm([part.float() if part.element_size() < 4 else part for part in parts])
    return torch.stack(norms).double().square().sum()
