"""The noise scale of a step of a single micro-batch, from the gradients of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.batch.noise.layer_calls import LayerCall, LayerRows, Rows
from lightning_lora.batch.noise.micro_gradients import Metric, MicroGradients
from lightning_lora.batch.noise.row_gradients import adapter_row_gradients
from lightning_lora.batch.noise.row_layers import row_layers
from lightning_lora.errors import ConfigError
from lightning_lora.lora.patterns import plain_name

# By how much of their norm rows may miss the gradient they add up to, by what layers compute in: rounding is far below,
# and a call that was not seen far above.
_TOLERANCE, _NARROW_TOLERANCE = 0.01, 0.1


class RowGradients(MicroGradients):
    """Where a step is one micro-batch on one device: its rows are the samples.

    Rows must be independent, as they are not where they meet in a norm over the batch or a contrastive loss.

    Args:
        module: Who is trained.
        parameters: What of it.
        metrics: As in `MicroGradients`.

    Raises:
        ConfigError: If a parameter has no gradient by rows.
    """

    def __init__(
        self, module: nn.Module, parameters: Sequence[nn.Parameter], metrics: Mapping[str, Metric] | None = None
    ) -> None:
        super().__init__(parameters, None, metrics)
        self._layers = row_layers(module, self.parameters)
        self._names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
        self._watch = LayerRows(self._layers, self._rows_of, self._take, after_dropout=True)
        self._clear()

    @override
    def start(self) -> None:
        super().start()
        self._clear()
        self._watch.start()

    @override
    def stop(self) -> None:
        self._watch.stop()
        self._clear()

    @override
    def _latest(self, num_rows: int) -> Tensor:
        self._watch.finish(num_rows)
        self._check()
        squares = torch.stack(self._parts).sum(0)
        self._clear()
        return squares

    def _clear(self) -> None:
        self._parts: list[Tensor] = []
        self._sums: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self._is_narrow = False

    def _rows_of(self, name: str, call: LayerCall) -> Rows:
        self._is_narrow |= call.is_narrow
        A, B = (factor.detach().to(call.x.dtype) for factor in self._layers[name][0].lora_pair())
        return adapter_row_gradients(call.x, call.d_y, A, B, call.scale)

    def _take(self, name: str, rows: Rows) -> None:
        pairs = zip(self._layers[name][0].lora_pair(), rows, strict=True)
        trained = [(factor, part) for factor, part in pairs if factor.requires_grad]
        spaces = [trained] + [[(p, metric(p, part)) for p, part in trained] for metric in self.metrics.values()]
        norms = [[part.flatten(1).norm(dim=1).double().square() for _, part in space] for space in spaces]
        self._parts.append(torch.stack([torch.stack(space).sum(0) for space in norms]))
        for (factor, part), squares in zip(trained, norms[0], strict=True):
            self._sums[factor] = part.sum(0), squares.sum()

    def _check(self) -> None:
        """The rows must add up to what the optimizer gets; if not, they were not seen, or not all of them."""
        missed: list[Tensor] = []
        graded = [p for p in self.parameters if p.grad is not None]
        for parameter in graded:
            assert parameter.grad is not None
            nothing = torch.zeros_like(parameter), parameter.new_zeros((), dtype=torch.float64)
            total, squares = self._sums.get(parameter, nothing)
            reference = torch.maximum(squares.sqrt(), parameter.grad.norm().double())
            missed.append((total - parameter.grad).norm().double() / reference)
        # Zero over zero is no miss; what is infinite is the scaler's business.
        shares = torch.stack(missed).nan_to_num(0.0, 0.0)
        if float(shares.max()) > (_NARROW_TOLERANCE if self._is_narrow else _TOLERANCE):
            worst = self._names.get(id(graded[int(shares.argmax())]), "a parameter")
            raise ConfigError(
                f"the gradients of the rows do not add up to that of {worst}: it is used in a way hooks do not see."
            )
