"""Prints an inspection on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_lora.cli.inspection import Inspection, LayerInspection
from lightning_lora.errors import first_five


def show(inspection: Inspection) -> None:
    """Print base, training and health of the adapter, and a table with one row per role."""
    console = Console(highlight=False, soft_wrap=True)
    summary = ", ".join(f"{name} {_short(value)}" for name, value in inspection.summary.items())
    console.print(f"{inspection.path}: {inspection.kind}, base {inspection.base or 'not recorded'}")
    console.print(f"base fingerprint {inspection.fingerprint or 'not recorded'}")
    console.print(f"training: {summary or 'not recorded'}")
    console.print(_table(inspection))
    if inspection.trained:
        console.print(f"trained in full: {first_five(inspection.trained)}")
    idle = inspection.idle
    found = f"{len(idle)} layers have no update: {first_five(idle)}" if idle else "every layer has an update"
    console.print(f"health: all values finite, {found}")


def _table(inspection: Inspection) -> Table:
    titles = ["role", "layers", "rank", "norm of update", "largest singular value", "effective rank"]
    has_magnitudes = any(layer.magnitude_change is not None for layer in inspection.layers)
    table = Table(*titles, *(["change of magnitudes"] if has_magnitudes else []))
    for role in dict.fromkeys(layer.role for layer in inspection.layers):
        layers = [layer for layer in inspection.layers if layer.role == role]
        table.add_row(
            role,
            str(len(layers)),
            _span([layer.rank for layer in layers]),
            _span([layer.norm for layer in layers]),
            _span([layer.largest for layer in layers]),
            _span([layer.effective_rank for layer in layers]),
            *([_share(layers)] if has_magnitudes else []),
        )
    return table


def _share(layers: Sequence[LayerInspection]) -> str:
    """The change of the magnitudes of some layers, in percent."""
    values = [layer.magnitude_change for layer in layers if layer.magnitude_change is not None]
    return f"{_span([100 * value for value in values])} %" if values else "-"


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return _short(low) if low == high else f"{_short(low)} to {_short(high)}"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
