"""Measures a step of a single micro-batch by the gradients of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.batch.noise.micro_gradients import Metric, MicroGradients
from lightning_lora.batch.noise.per_example_gradients import adapter_row_gradients
from lightning_lora.batch.noise.row_collector import LayerCall, PerRow, RowCollector, rows_per_sample
from lightning_lora.batch.noise.row_layers import row_layers
from lightning_lora.errors import ConfigError
from lightning_lora.lora.patterns import plain_name

# Largest distance between the sum of the row gradients and the gradient itself, relative to their norm. Rounding is far
# below it, and a layer call that hooks did not see is far above.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 0.01, 0.1


class RowGradients(MicroGradients):
    """Samples are the rows of a step's only micro-batch, on one device.

    Rows must be independent. They are not where they meet in a batch norm or a contrastive loss.

    Args:
        module: The module being trained. Its ``rows_per_sample``, 1 if it has none, count as one.
        parameters: Its trained parameters.
        metrics: Further metrics by name, see `MicroGradients`.

    Raises:
        ConfigError: If a parameter has no per-row gradients.
    """

    def __init__(
        self, module: nn.Module, parameters: Sequence[nn.Parameter], metrics: Mapping[str, Metric] | None = None
    ) -> None:
        super().__init__(parameters, None, metrics)
        self._layers = row_layers(module, self.parameters)
        self._names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
        self._collector = RowCollector(self._layers, self._rows_of, self._take, True, rows_per_sample(module))
        self._clear()

    @override
    def start(self) -> None:
        super().start()
        self._clear()
        self._collector.start()

    @override
    def stop(self) -> None:
        self._collector.stop()
        self._clear()

    @override
    def _latest(self, num_rows: int) -> Tensor:
        self._collector.finish(num_rows)
        self._check_sum()
        squares = torch.stack(self._squares_of_layers).sum(0)
        self._clear()
        return squares

    def _clear(self) -> None:
        self._squares_of_layers: list[Tensor] = []
        # The sum over rows of each parameter's gradients, and the sum of their square norms.
        self._sums: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self._is_low_precision = False

    def _rows_of(self, name: str, call: LayerCall) -> PerRow:
        self._is_low_precision |= call.is_low_precision
        layer = self._layers[name][0]
        A, B = (factor.detach().to(call.x.dtype) for factor in layer.lora_pair())
        d_A, d_B = adapter_row_gradients(call.x, call.d_y, A, B, call.scale)
        if start := layer.lora_spec.start:
            # These components stay as they start.
            d_A[:, start : 2 * start], d_B[:, :, start : 2 * start] = 0, 0
        return d_A, d_B

    def _take(self, name: str, rows: PerRow) -> None:
        factors = zip(self._layers[name][0].lora_pair(), rows, strict=True)
        trained = [(factor, part) for factor, part in factors if factor.requires_grad]
        scaled = [trained] + [[(p, metric(p, part)) for p, part in trained] for metric in self.metrics.values()]
        squares = [[part.flatten(1).norm(dim=1).double().square() for _, part in parts] for parts in scaled]
        self._squares_of_layers.append(torch.stack([torch.stack(of_metric).sum(0) for of_metric in squares]))
        for (factor, part), square in zip(trained, squares[0], strict=True):
            self._sums[factor] = part.sum(0), square.sum()

    def _check_sum(self) -> None:
        """Check that the row gradients add up to the gradient; if they do not, hooks did not see all of them."""
        distances: list[Tensor] = []
        graded = [p for p in self.parameters if p.grad is not None]
        for parameter in graded:
            assert parameter.grad is not None
            nothing = torch.zeros_like(parameter), parameter.new_zeros((), dtype=torch.float64)
            total, squares = self._sums.get(parameter, nothing)
            norm = torch.maximum(squares.sqrt(), parameter.grad.norm().double())
            distances.append((total - parameter.grad).norm().double() / norm)
        # NaN is zero over zero, which agrees; infinite gradients are left to the gradient scaler.
        relative = torch.stack(distances).nan_to_num(0.0, 0.0)
        tolerance = _LOW_PRECISION_TOLERANCE if self._is_low_precision else _TOLERANCE
        if (largest := float(relative.max())) > tolerance:
            name = self._names.get(id(graded[int(relative.argmax())]), "a parameter")
            raise ConfigError(
                f"the row gradients of {name} miss its gradient by {largest:.1%} (tolerance {tolerance:.0%}): it is "
                "used in a way that hooks do not see. Set accumulate_grad_batches=2 with half the batch."
            )
