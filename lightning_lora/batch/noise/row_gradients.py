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
from lightning_lora.errors import MeasurementError
from lightning_lora.lora.patterns import plain_name

# Largest distance between the sum of the row gradients and the gradient itself, relative to their norm. Rounding is far
# below it, and a layer call that hooks did not see is far above.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 0.01, 0.1


class RowGradients(MicroGradients):
    """Samples are the rows of a step's only micro-batch, on one device.

    Rows must be independent. They are not where they meet in a batch norm or a contrastive loss.

    Args:
        module: The module being trained. Its ``rows_per_sample``, 1 if it has none, count as one.
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
        self._parts = {}

    @override
    @torch.no_grad()
    def _latest(self, num_rows: int) -> Tensor:
        self._collector.finish(num_rows)
        num_metrics = 1 + len(self.metrics)
        # (parameters, metrics, rows)
        norms = torch.stack([norm for _, norms in self._parts.values() for norm in norms])
        squares = norms.double().square().unflatten(0, (-1, num_metrics))
        self._relative = self._distances(squares[:, 0].sum(-1))
        self._parts = {}
        return squares.sum(0)

    @override
    def _evidence(self) -> Tensor:
        return self._relative

    @override
    def _check(self, evidence: Tensor) -> None:
        """Check that the row gradients add up to the gradient; if they do not, hooks did not see all of them."""
        # NaN is zero over zero, which agrees; infinite gradients are left to the gradient scaler.
        relative = evidence.nan_to_num(0.0, 0.0)
        tolerance = _LOW_PRECISION_TOLERANCE if self._is_low_precision else _TOLERANCE
        if (largest := float(relative.max())) > tolerance:
            name = self._names.get(id(self._graded[int(relative.argmax())]), "a parameter")
            raise MeasurementError(
                f"the row gradients of {name} miss its gradient by {largest:.1%} (tolerance {tolerance:.0%}): it is "
                "used in a way that hooks do not see. Set accumulate_grad_batches=2 with half the batch."
            )

    def _clear(self) -> None:
        # Of each parameter the sum of its rows' gradients, and the norms ``(rows,)`` of these by metric.
        self._parts: dict[nn.Parameter, tuple[Tensor, list[Tensor]]] = {}
        self._graded: list[nn.Parameter] = []
        self._is_low_precision = False

    def _distances(self, squares: Tensor) -> Tensor:
        """The distance of the summed row gradients to the gradient, relative to their norm, of each parameter.

        Args:
            squares: ``(parameters,)``, square norms of the row gradients of each parameter that has some.
        """
        own = dict(zip(self._parts, squares.unbind(), strict=True))
        self._graded = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in self._graded if p.grad is not None]
        totals = [self._parts[p][0] if p in own else torch.zeros_like(p) for p in self._graded]
        by_rows = torch.stack([own[p] if p in own else squares.new_zeros(()) for p in self._graded]).sqrt()
        norms = torch.stack(torch._foreach_norm(gradients)).double()
        distances = torch.stack(torch._foreach_norm(torch._foreach_sub(totals, gradients))).double()
        return distances / torch.maximum(by_rows, norms)

    def _rows_of(self, name: str, call: LayerCall) -> PerRow:
        self._is_low_precision |= call.is_low_precision
        layer = self._layers[name][0]
        A, B = (factor.to(call.x.dtype) for factor in layer.lora_pair())
        d_A, d_B = adapter_row_gradients(call.x, call.d_y, A, B, call.scale)
        if start := layer.lora_spec.start:
            # These components stay as they start.
            d_A[:, start : 2 * start], d_B[:, :, start : 2 * start] = 0, 0
        return d_A, d_B

    def _take(self, name: str, rows: PerRow) -> None:
        for factor, part in zip(self._layers[name][0].lora_pair(), rows, strict=True):
            if factor.requires_grad:
                scaled = [part, *(metric(factor, part) for metric in self.metrics.values())]
                self._parts[factor] = part.sum(0), [torch.linalg.vector_norm(each, dim=(1, 2)) for each in scaled]
