"""The noise scale that training the frozen weights themselves would have, from the passes that train the adapters.

Gradients of adapters are a linear image of those of the weights, ``d_A = s B^T G`` and ``d_B = s G A^T``. The ratio of
both noise scales tells how much of the signal that image keeps. Gradients of weights are never formed: a sketch of
``32 x 32`` numbers a row stands for each, or the gradient itself where it is not larger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_lora.batch.noise.per_example_gradients import sketch_matrix, weight_row_sketches
from lightning_lora.batch.noise.row_collector import LayerCall, PerRow, RowCollector, rows_per_sample
from lightning_lora.batch.noise.row_layers import row_layers
from lightning_lora.batch.noise.step_sample import StepSample, step_samples

_SIDE = 32
_SEED = 2**31 - 1


class WeightSketches:
    """Measures all rows of a step: `start`, `add` after each backward pass, `finish`, as in `MicroGradients`.

    Args:
        group: The data-parallel ranks, with whole parameters on each; None on one device.

    Raises:
        ConfigError: If a parameter is trained outside of adapted linear layers, or hooks do not see the computation.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter], group: ProcessGroup | None) -> None:
        layers = row_layers(module, parameters)
        self.group = group
        self._places = {name: place for place, name in enumerate(layers)}
        self._collector = RowCollector(layers, self._rows_of, self._take, False, rows_per_sample(module))
        self._step = 0
        self._clear()

    def start(self, step: int) -> None:
        """Begin to measure optimizer step ``step``. It seeds the sketches, so it must be equal on all ranks."""
        self._step = step
        self._clear()
        self._collector.start()

    def add(self, num_rows: int, loss_scale: float = 1.0) -> None:
        """Measure the micro-batch of ``num_rows`` rows whose backward pass is over."""
        if self._error is not None:
            return
        try:
            self._collector.finish(num_rows)
            self._squares.append(torch.stack(self._squares_of_layers).sum(0) / loss_scale**2)
            for name, total in self._latest.items():
                self._sums[name] = self._sums.get(name, 0) + total / loss_scale
        except Exception as error:
            self._error = error
        self._squares_of_layers, self._latest = [], {}

    def finish(self, weighted_by_rows: bool) -> StepSample | None:
        """The sample of the step, or None if it is not finite; a collective. See `MicroGradients.finish`.

        Raises:
            Exception: On all ranks, if any rank failed.
        """
        self._collector.stop()
        error, squares = self._error, [part.tolist() for part in self._squares]
        micro_batches = [micro_batch for rank in self._of_all_ranks(None if error else squares) for micro_batch in rank]
        num_ranks = 1 if self.group is None else torch.distributed.get_world_size(self.group)
        mean_square = (self._total() / num_ranks).square().sum()[None]
        flat = torch.tensor([square for rows in micro_batches for square in rows], dtype=torch.float64)
        shares = [1 / len(flat) if weighted_by_rows else 1 / len(micro_batches) / len(rows) for rows in micro_batches]
        weights = [share for rows, share in zip(micro_batches, shares, strict=True) for _ in rows]
        self._clear()
        if len(flat) < 2:
            return None
        of_rows = torch.tensor(weights, dtype=torch.float64) * num_ranks
        return step_samples(("weight",), flat[None], mean_square, torch.ones_like(flat), of_rows).get("weight")

    def stop(self) -> None:
        """Give up the measurement of this step."""
        self._collector.stop()
        self._clear()

    def _clear(self) -> None:
        # Square norms (rows,) of each micro-batch, and the sum of its sketches by layer.
        self._squares: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        # The same of the latest micro-batch, layer by layer.
        self._squares_of_layers: list[Tensor] = []
        self._latest: dict[str, Tensor] = {}
        self._error: Exception | None = None

    def _of_all_ranks(self, own: list[list[float]] | None) -> list[list[list[float]]]:
        """The square norms of all ranks; raises if a rank has none."""
        found: list[list[list[float]] | None] = [own]
        if self.group is not None:
            found = [None] * torch.distributed.get_world_size(self.group)
            torch.distributed.all_gather_object(found, own, group=self.group)
        whole = [part for part in found if part is not None]
        if len(whole) < len(found):
            error = self._error or RuntimeError("it failed on another rank")
            self._clear()
            raise error
        return whole

    def _total(self) -> Tensor:
        """Sums ``(layers, 32, 32)`` over all ranks, zero for a layer that was not called on any."""
        device = next(iter(self._sums.values())).device
        total = torch.zeros(len(self._places), _SIDE, _SIDE, dtype=torch.float64, device=device)
        for name, part in self._sums.items():
            total[self._places[name], : part.shape[0], : part.shape[1]] = part
        if self.group is not None:
            torch.distributed.all_reduce(total, group=self.group)
        return total

    def _rows_of(self, name: str, call: LayerCall) -> PerRow:
        # Sketch matrices are drawn again for each call, which costs less than keeping them, and differ from step to
        # step, so that the error of the sketched norms averages out.
        generator = torch.Generator(call.x.device)
        generator.manual_seed(_SEED + self._step * len(self._places) + self._places[name])
        left = sketch_matrix(_SIDE, call.d_y.shape[-1], generator).to(call.x.dtype)
        right = sketch_matrix(_SIDE, call.x.shape[-1], generator).to(call.x.dtype).T
        return (weight_row_sketches(call.x, call.d_y, left, right),)

    def _take(self, name: str, rows: PerRow) -> None:
        sketches = rows[0].double()
        self._squares_of_layers.append(sketches.flatten(1).square().sum(1))
        self._latest[name] = sketches.sum(0)
