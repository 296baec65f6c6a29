"""Collects per-row quantities of layers from a training pass: each layer's input and the gradient of its output.

Forward hooks see both in any pass that trains, so nothing is computed twice and no random number is drawn. Hooks before
the forward pass are not used: they would separate layers that are computed together (`siblings`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.errors import MeasurementError
from lightning_lora.lora.functional.linear_group import Settings
from lightning_lora.lora.functional.seeded_dropout import Seed, drop
from lightning_lora.lora.layers.base import LoRALayer

PerRow = tuple[Tensor, ...]
"""Tensors whose first dimension is the rows of a micro-batch."""


def rows_per_sample(module: nn.Module) -> int:
    """Rows side by side that count as one: ``rows_per_sample`` of a module, such as both rows of a pair; else 1."""
    return getattr(module, "rows_per_sample", 1)


class LayerCall(NamedTuple):
    """One call of a layer, in float32 or float64.

    Args:
        x: ``(n, t, in)``, the input: ``n`` rows of ``t`` positions.
        d_y: ``(n, t, out)``, the gradient of the output.
        scale: Factor of the update ``scale * x A^T B^T``.
        is_low_precision: Whether the layer computed in less than float32.
    """

    x: Tensor
    d_y: Tensor
    scale: float
    is_low_precision: bool


@dataclass
class _PendingCall:
    """A call of a layer whose output has no gradient yet."""

    name: str
    x: Tensor | None
    version: int
    scale: float
    dropout: tuple[float, Seed] = (0.0, 0)


class RowCollector:
    """Collects per-row tensors of each layer. A layer called several times in one pass contributes the sum.

    An error in a hook does not disturb the training pass; `finish` raises it.

    Args:
        layers: The layers to watch by name. Layers that share a weight are in one entry.
        rows_of: Computes the per-row tensors of one call, from the name and the `LayerCall`.
        take: Receives the name and the per-row tensors, summed over the calls of that name.
        after_dropout: Whether `LayerCall.x` is the input of the update, after dropout, or the input of the layer.
        together: Rows side by side that count as one, such as the completions of a prompt.
    """

    def __init__(
        self,
        layers: Mapping[str, Sequence[LoRALayer]],
        rows_of: Callable[[str, LayerCall], PerRow],
        take: Callable[[str, PerRow], None],
        after_dropout: bool,
        together: int = 1,
    ) -> None:
        self.layers, self.after_dropout, self.together = layers, after_dropout, together
        self._rows_of, self._take = rows_of, take
        self._handles: list[Any] = []
        self._reset()

    def start(self) -> None:
        """Watch the passes that follow."""
        self._reset()
        for name, layers in self.layers.items():
            for layer in layers:
                hook = partial(self._after_forward, name)
                self._handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
                if self.after_dropout:
                    layer.lora_watcher = self._note_dropped

    def stop(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.after_dropout:
            for layers in self.layers.values():
                for layer in layers:
                    layer.lora_watcher = None
        self._reset()

    def finish(self, num_rows: int | None) -> None:
        """End a micro-batch of ``num_rows`` rows, after its backward pass; None: layers may have other rows.

        Raises:
            ConfigError: If the rows of a layer are not those of the batch, or no gradient arrived.
        """
        try:
            if self._error is not None:
                raise self._error
            if not self._sizes:
                raise MeasurementError("no output of an adapted layer received a gradient in a backward pass.")
            for name, size in self._sizes.items():
                if num_rows is not None and size != num_rows:
                    raise MeasurementError(
                        f"{name} receives {size} rows where the batch has {num_rows}: rows are not the first "
                        f"dimension of its input."
                    )
            for name, rows in self._sums.items():
                self._take(name, rows)
        finally:
            self._reset()

    def _reset(self) -> None:
        self._calls: Counter[str] = Counter()
        self._sums: dict[str, PerRow] = {}
        self._sizes: dict[str, int] = {}
        self._dropped: Tensor | None = None
        self._error: Exception | None = None

    def _note_dropped(self, dropped: Tensor) -> None:
        self._dropped = dropped

    def _after_forward(self, name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        dropped, self._dropped = self._dropped, None
        if self._error is not None or not layer.lora_active or not output.requires_grad:
            return
        try:
            x = args[0] if args else next(iter(kwargs.values()))
            call = self._pending_call(name, layer, x, dropped, output)
            self._calls[name] += 1
            output.register_hook(partial(self._on_gradient, call))
        except Exception as error:
            self._error = error

    def _pending_call(
        self, name: str, layer: LoRALayer, x: Tensor, dropped: Tensor | None, output: Tensor
    ) -> _PendingCall:
        if torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportAttributeAccessIssue]
            raise MeasurementError(
                f"{name} runs its forward pass again in the backward pass (activation checkpointing)."
            )
        scale = layer.lora_spec.scale
        if not self.after_dropout:
            return _PendingCall(name, x, x._version, scale)
        settings = getattr(output.grad_fn, "settings", None)
        if isinstance(settings, Settings):
            scale = settings.scales[output.output_nr]
            return _PendingCall(name, x, x._version, scale, (settings.dropout, settings.seed))
        if dropped is None:
            raise MeasurementError(f"the input of the update of {name} ({type(layer).__name__}) could not be observed.")
        return _PendingCall(name, dropped, dropped._version, scale)

    @torch.no_grad()
    def _on_gradient(self, call: _PendingCall, d_y: Tensor | None) -> None:
        x, call.x = call.x, None
        if d_y is None or self._error is not None:
            return
        try:
            if x is None or x._version != call.version:
                raise MeasurementError(f"the input of {call.name} was changed in place, or its graph is used twice.")
            with torch.autocast(d_y.device.type, enabled=False):
                self._add(call, x, d_y)
        except Exception as error:
            self._error = error

    def _add(self, call: _PendingCall, x: Tensor, d_y: Tensor) -> None:
        name, is_low_precision = call.name, d_y.element_size() < 4
        x = _by_row(drop(x, *call.dropout), self.together)
        rows = self._rows_of(name, LayerCall(x, _by_row(d_y, self.together), call.scale, is_low_precision))
        if self._sizes.setdefault(name, len(x)) != len(x):
            raise MeasurementError(f"{name} is called with {self._sizes[name]} rows and with {len(x)} in one pass.")
        if self._calls[name] == 1:
            self._take(name, rows)
        else:
            # Rows of all calls must be added before they are squared.
            before = self._sums.get(name)
            self._sums[name] = rows if before is None else tuple(map(torch.add, before, rows))


def _by_row(tensor: Tensor, together: int) -> Tensor:
    """``(n, t, features)`` in float32 or float64, with ``together`` rows in one."""
    if tensor.dim() < 2 or len(tensor) % together:
        raise MeasurementError(f"a layer receives {len(tensor)} vectors without a dimension of rows.")
    # Gradients are off here: nothing needs to be detached.
    rows = tensor
    if together > 1 or tensor.dim() != 3:
        rows = tensor.reshape(len(tensor) // together, -1, tensor.shape[-1])
    return rows.float() if rows.element_size() < 4 else rows
