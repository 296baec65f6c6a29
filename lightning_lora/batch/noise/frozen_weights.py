"""The noise scale that training the frozen weights themselves would meet, from the same passes as the adapters'.

Gradients of adapters are a linear image of those of the weights, ``d_A = s B^T G`` and ``d_B = s G A^T``: the quotient
of both noise scales says how much of the signal that image keeps. Gradients of weights are never formed; sketches of
``32 x 32`` numbers a row stand for them, or the gradient itself where it is no larger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_lora.batch.noise.layer_calls import LayerCall, LayerRows, Rows
from lightning_lora.batch.noise.row_gradients import sketch_matrix, weight_row_sketches
from lightning_lora.batch.noise.row_layers import row_layers
from lightning_lora.batch.noise.step_sample import StepSample, step_samples

_SIDE = 32
_SEED = 2**31 - 1


class WeightSketches:
    """Measures a step as `MicroGradients` does, all rows of it: `start`, `add` after each backward pass, `finish`.

    Args:
        module: Who is trained.
        parameters: What of it.
        group: The data-parallel ranks, whole parameters on each; None on one device.

    Raises:
        ConfigError: If not all of it is in adapted linear layers, or hooks do not see these.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter], group: ProcessGroup | None) -> None:
        layers = row_layers(module, parameters)
        self.group = group
        self._places = {name: place for place, name in enumerate(layers)}
        self._watch = LayerRows(layers, self._rows_of, self._take, after_dropout=False)
        self._step = 0
        self._clear()

    def start(self, step: int) -> None:
        """Begin to measure optimizer step ``step``, the same on all ranks: it chooses the sketches."""
        self._step = step
        self._clear()
        self._watch.start()

    def add(self, num_rows: int, loss_scale: float = 1.0) -> None:
        """Note the micro-batch of ``num_rows`` rows whose backward pass is over."""
        if self._error is not None:
            return
        try:
            self._watch.finish(num_rows)
            self._squares.append(torch.stack(self._parts).sum(0) / loss_scale**2)
            for name, total in self._latest.items():
                self._sums[name] = self._sums.get(name, 0) + total / loss_scale
        except Exception as error:
            self._error = error
        self._parts, self._latest = [], {}

    def finish(self, weighted_by_rows: bool, unit: float) -> StepSample | None:
        """The sample of the step, arguments as in `MicroGradients.finish`; None if it is not finite. A collective.

        Raises:
            Exception: On all ranks, whatever went wrong on one.
        """
        self._watch.stop()
        error, squares = self._error, [part.tolist() for part in self._squares]
        micro_batches = [micro_batch for rank in self._everyone(None if error else squares) for micro_batch in rank]
        num_ranks = 1 if self.group is None else torch.distributed.get_world_size(self.group)
        mean_square = (self._total() / num_ranks).square().sum()[None]
        flat = torch.tensor([square for rows in micro_batches for square in rows], dtype=torch.float64)
        shares = [1 / len(flat) if weighted_by_rows else 1 / len(micro_batches) / len(rows) for rows in micro_batches]
        weights = [share for rows, share in zip(micro_batches, shares, strict=True) for _ in rows]
        self._clear()
        if len(flat) < 2:
            return None
        ones, spread = torch.ones_like(flat), torch.tensor(weights, dtype=torch.float64)
        return step_samples(("weight",), flat[None], mean_square, ones, spread, num_ranks, unit).get("weight")

    def stop(self) -> None:
        """Measure no more of this step."""
        self._watch.stop()
        self._clear()

    def _clear(self) -> None:
        self._squares: list[Tensor] = []
        self._parts: list[Tensor] = []
        self._latest: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._error: Exception | None = None

    def _everyone(self, own: list[list[float]] | None) -> list[list[list[float]]]:
        """The squares of all ranks; raises if one has none."""
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
        """The sums of all layers over all ranks, padded: one that a rank did not call has a place there too."""
        device = next(iter(self._sums.values())).device
        total = torch.zeros(len(self._places), _SIDE, _SIDE, dtype=torch.float64, device=device)
        for name, part in self._sums.items():
            total[self._places[name], : part.shape[0], : part.shape[1]] = part
        if self.group is not None:
            torch.distributed.all_reduce(total, group=self.group)
        return total

    def _rows_of(self, name: str, call: LayerCall) -> Rows:
        # Made again for each call, which costs less than keeping them; other ones in each step, so that what a sketch
        # adds to the norms averages out.
        generator = torch.Generator(call.x.device)
        generator.manual_seed(_SEED + self._step * len(self._places) + self._places[name])
        left = _sketch(call.d_y.shape[-1], generator).to(call.x.dtype)
        right = _sketch(call.x.shape[-1], generator).to(call.x.dtype).T
        return (weight_row_sketches(call.x, call.d_y, left, right),)

    def _take(self, name: str, rows: Rows) -> None:
        sketches = rows[0].double()
        self._parts.append(sketches.flatten(1).square().sum(1))
        self._latest[name] = sketches.sum(0)


def _sketch(length: int, generator: torch.Generator) -> Tensor:
    """``(side, length)``; where there is nothing to save, the vector itself."""
    if length <= _SIDE:
        return torch.eye(length, device=generator.device)
    return sketch_matrix(_SIDE, length, _SIDE, generator)
