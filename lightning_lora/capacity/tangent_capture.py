r"""How much of the gradient of the frozen weights adapters can follow, compared with its noise.

A small change of ``A`` and ``B`` moves ``B A`` within the tangent space of matrices of its rank. The projection of the
gradient ``G`` of a weight on it is ``P G = G - (I - Q_B Q_B^T) G (I - Q_A Q_A^T)``. Tangent capture is the share of the
mean gradient that it keeps, over the share of the noise: ``(|P G|^2 / |G|^2) / (tr P Sigma / tr Sigma)``. At a low
learning rate adapters that are full have used up what their tangent space holds, and keep less of the signal than of
the noise. Squares of means are unbiased estimates from single rows, and gradients are sketched, as in
`batch.noise.frozen_weights`.

Of a layer with a magnitude (DoRA) the directions are measured. They are the tangent space of ``g B`` and ``A``, with
``g`` what each row of the weight is rescaled by; magnitudes hold one number for each row of ``G``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lora.batch.counting import count_rows
from lightning_lora.batch.noise.per_example_gradients import sketch_matrix, weight_row_sketches
from lightning_lora.batch.noise.row_collector import LayerCall, PerRow, RowCollector
from lightning_lora.batch.noise.row_layers import row_layers
from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.batch.trial_step import on_device, training_loss
from lightning_lora.capacity.row_scores import mean_training_loss, predicted_losses
from lightning_lora.errors import MeasurementError
from lightning_lora.lora.layers.adapted import learning_layers
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.dora import DoRALayer

_SIDE = 64
_SEED = 2**31 - 1
_BLOCKS = 32
"""Parts of the rows, each left out once for the standard error."""


@dataclass(frozen=True)
class Capture:
    """Tangent capture of some layers.

    Args:
        value: The estimate; near or above 1 where adapters follow the gradient as well as its noise.
        error: Its standard error, by leaving out blocks of rows.
        signal_to_error: Square of the mean gradient over its standard error; below 2 the estimate is inconclusive.
        num_weights: Number of adapted weights that were measured.
    """

    value: float
    error: float
    signal_to_error: float
    num_weights: int = 1

    @property
    def is_conclusive(self) -> bool:
        """Whether the mean gradient stands out from its noise."""
        return self.signal_to_error >= 2 and math.isfinite(self.value + self.error)

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + 2 * self.error


def tangent_capture(
    trainer: Trainer, module: LightningModule, batches: Sequence[Any], groups: Mapping[str, Sequence[str]]
) -> tuple[Capture, dict[str, Capture]]:
    """Measure tangent capture on single rows of ``batches``: of all adapted linear layers, and of each group.

    Args:
        module: The module, in evaluation mode and within `observed`. Gradients of its parameters stay as they are.
        groups: Names of groups to names of adapted weights. Groups without linear layers are left out.

    Raises:
        ConfigError: If there are no adapted linear layers, or hooks do not see what they compute.
    """
    rows = _TangentRows(module)
    for place, batch in enumerate(batches):
        rows.add(place * _BLOCKS // len(batches), trainer, on_device(trainer, batch))
    if not rows.measured:
        raise MeasurementError(
            "the rows of a batch are not the first dimension of what adapted linear layers are given."
        )
    of_groups = {group: [name for name in names if name in rows.measured] for group, names in groups.items()}
    return rows.capture(rows.measured), {group: rows.capture(names) for group, names in of_groups.items() if names}


class _TangentRows:
    """Sums over rows of sketches of ``G`` and ``P G`` and of their squares, by block and layer."""

    def __init__(self, module: LightningModule) -> None:
        factors = [factor for layer in learning_layers(module).values() for factor in layer.lora_factors().values()]
        layers = row_layers(module, factors, skips_others=True)
        if not layers:
            raise MeasurementError("tangent capture is measured for linear layers only, and none of those is adapted.")
        self.module, self.factors = module, [factor for factor in factors if factor.requires_grad]
        self._bases = {name: _bases(each[0]) for name, each in layers.items()}
        self._places = {name: place for place, name in enumerate(layers)}
        self._collector = RowCollector(layers, self._rows_of, self._take, after_dropout=False)
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._squares: dict[tuple[int, str], Tensor] = {}
        self._counts = torch.zeros(_BLOCKS, dtype=torch.float64)
        self._block = self._num_rows = 0
        self._others: set[str] = set()

    @property
    def measured(self) -> list[str]:
        """Names of the layers that received a gradient, of inputs whose first dimension is the rows of the batch."""
        received = {name for _, name in self._sums}
        return [name for name in self._places if name in received - self._others]

    def add(self, block: int, trainer: Trainer, batch: Any) -> None:
        """Measure the rows of a batch; autograd writes no gradient into the parameters."""
        self._block, self._num_rows = block, count_rows(batch)
        self._collector.start()
        try:
            with torch.enable_grad():
                loss = self._loss_sum(trainer, batch, self._num_rows)
                torch.autograd.grad(loss, self.factors, allow_unused=True)
            self._collector.finish(None)
        finally:
            self._collector.stop()
        self._counts[block] += self._num_rows

    def _loss_sum(self, trainer: Trainer, batch: Any, num_rows: int) -> Tensor:
        """The sum of losses over rows or tokens, up to a constant that every batch has."""
        if not self.module.automatic_optimization:
            return _predicted_sum(trainer, self.module, batch)  # its training_step would step the optimizers
        if isinstance(self.module, TokenWeightedLoss):
            loss = training_loss(trainer, self.module, batch)
            self.module.mean_of_micro_batch(torch.zeros(()))  # closes the window
        else:
            loss = mean_training_loss(trainer, self.module, batch)[0] * num_rows
        if not isinstance(loss, Tensor):
            raise MeasurementError(f"{type(self.module).__name__}.training_step returned no loss for a batch.")
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return loss if scaler is None else loss * scaler.get_scale()

    def _rows_of(self, name: str, call: LayerCall) -> PerRow:
        Q_A, Q_B = (basis.to(call.x.dtype) for basis in self._bases[name])
        generator = torch.Generator(call.x.device).manual_seed(_SEED + self._places[name])
        left = sketch_matrix(_SIDE, call.d_y.shape[-1], generator).to(call.x.dtype)
        right = sketch_matrix(_SIDE, call.x.shape[-1], generator).to(call.x.dtype).T
        whole = weight_row_sketches(call.x, call.d_y, left, right)
        d_y, x = call.d_y - call.d_y @ Q_B @ Q_B.T, call.x - call.x @ Q_A @ Q_A.T
        return whole, whole - weight_row_sketches(x, d_y, left, right)

    def _take(self, name: str, rows: PerRow) -> None:
        if len(rows[0]) != self._num_rows:  # experts get tokens of all rows at once
            self._others.add(name)
            return
        key = self._block, name
        both = torch.stack(rows).double()
        self._sums[key] = self._sums.get(key, 0) + both.sum(1).float()
        self._squares[key] = self._squares.get(key, 0) + both.flatten(2).square().sum((1, 2)).cpu()

    def capture(self, names: Iterable[str]) -> Capture:
        """The capture of some layers together, with its standard error by leaving out blocks."""
        blocks = [block for block in range(_BLOCKS) if self._counts[block]]
        counts, names = self._counts[blocks], list(names)
        squares = torch.zeros(len(blocks), 2, dtype=torch.float64)
        gram = torch.zeros(2, len(blocks), len(blocks), dtype=torch.float64)
        for name in names:
            found = [self._sums.get((block, name)) for block in blocks]
            zero = next(part for part in found if part is not None) * 0
            sums = torch.stack([zero if part is None else part for part in found], 1).flatten(2).double()
            gram += (sums @ sums.mT).cpu()
            squares += torch.stack([self._squares.get((block, name), torch.zeros(2).double()) for block in blocks])
        value, signal = _ratio(gram.sum((1, 2)), squares.sum(0), counts.sum())
        without = [_left_out(gram, squares, counts, place) for place in range(len(blocks))]
        values, signals = (torch.tensor(each, dtype=torch.float64) for each in zip(*without, strict=True))
        error_of_signal = _jackknife_error(signals)
        certainty = signal / error_of_signal if error_of_signal > 0 else 0.0
        return Capture(value, _jackknife_error(values), certainty, len(names))


def _predicted_sum(trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
    found = predicted_losses(trainer, module, batch)
    if found is None or not found[0].requires_grad:
        raise MeasurementError(
            f"{type(module).__name__} steps its optimizers itself, and the losses of its predict_step have no gradient."
        )
    losses, tokens = found
    return (losses * tokens.to(losses.dtype)).sum()


def _left_out(gram: Tensor, squares: Tensor, counts: Tensor, place: int) -> tuple[float, float]:
    kept = [block for block in range(len(counts)) if block != place]
    return _ratio(gram[:, kept][:, :, kept].sum((1, 2)), squares[kept].sum(0), counts[kept].sum())


def _ratio(square_of_sum: Tensor, sum_of_squares: Tensor, count: Tensor) -> tuple[float, float]:
    """The capture, and the signal of the whole gradient, from unbiased estimates ``(whole, projected)``."""
    if count < 2:
        return math.nan, math.nan
    mean_square, square_of_mean = sum_of_squares / count, square_of_sum / count**2
    signal = (count * square_of_mean - mean_square) / (count - 1)
    noise = count / (count - 1) * (mean_square - square_of_mean)
    return float(signal[1] / signal[0] / (noise[1] / noise[0])), float(signal[0])


def _jackknife_error(values: Tensor) -> float:
    count = len(values)
    return float(((count - 1) / count * (values - values.mean()).square().sum()).sqrt()) if count > 1 else math.inf


def _bases(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """Orthonormal bases ``(in, .)`` of the rows of A and ``(out, .)`` of the columns of B, which may be dependent.

    Components that stay as they start move nothing. With a magnitude, rows of B count as they are rescaled.
    """
    (A, B), start = (factor.detach() for factor in layer.lora_pair()), layer.lora_spec.start
    if start:
        trained = [place for place in range(A.shape[0]) if not start <= place < 2 * start]
        A, B = A[trained], B[:, trained]
    if isinstance(layer, DoRALayer):
        B = B * layer.lora_ratio().detach().unsqueeze(1).to(B.dtype)
    return _basis(A.mT), _basis(B)


def _basis(columns: Tensor) -> Tensor:
    U, S, _ = torch.linalg.svd(
        columns.double() if columns.dtype == torch.float64 else columns.float(), full_matrices=False
    )
    return U[:, S.max() * max(columns.shape) * torch.finfo(S.dtype).eps < S]
