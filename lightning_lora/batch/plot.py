"""Draws what the batch-size monitor measured, from ``events.jsonl`` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_lora.batch.reading import NOISE_LIMITED, SIGNAL_LIMITED
from lightning_lora.errors import ResultFileError
from lightning_lora.files.atomic import atomic_file
from lightning_lora.files.events import EVENTS_FILE, read_events


def plot_noise_scale(folder: Path, path: Path) -> None:
    """Draw the noise scale with its interval and the batch, the progress per row, and signal and noise separately.

    Raises:
        DataError: If ``events.jsonl`` holds no samples.
    """
    events = _samples_of_last_run(folder)
    if not events:
        raise ResultFileError(
            f"{folder / EVENTS_FILE} holds no samples of a BatchSizeMonitor: was there one in the run?"
        )
    with_lambda = [event for event in events if event.get("gns/lambda") is not None]
    num_panels = 4 if with_lambda else 3
    figure = Figure(figsize=(4 * num_panels, 3.6), layout="constrained")
    noise, progress, parts, *more = figure.subplots(1, num_panels)
    _draw_noise(noise, events)
    _draw_progress(progress, events[-1])
    _draw_parts(parts, events)
    for axes in more:
        _draw_lambda(axes, with_lambda)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _samples_of_last_run(folder: Path) -> list[dict[str, Any]]:
    """Samples since the last start from step 0. If a resumed run repeated a step, its latest sample counts."""
    samples: dict[int, dict[str, Any]] = {}
    for event in read_events(folder):
        if event["event"] == "batch" and event["step"] == 0:
            samples = {}
        if event["event"] == "noise_scale":
            samples[event["step"]] = event
    return [samples[step] for step in sorted(samples)]


def _column(events: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([math.nan if event[name] is None else event[name] for event in events], dtype=float)


def _draw_noise(axes: Axes, events: Sequence[dict[str, Any]]) -> None:
    rows = _column(events, "rows_seen")
    value, low, high = (_column(events, f"gns/{name}") for name in ("value", "low", "high"))
    known = np.isfinite(low) & (low > 0)  # others cannot be drawn on a logarithmic axis
    axes.fill_between(rows, low, high, where=known, alpha=0.25, linewidth=0, label="95 % interval")
    axes.plot(rows, np.where(known, value, math.nan), label="noise scale")
    axes.step(rows, _column(events, "batch/rows"), where="post", color="black", linestyle="--", label="batch")
    axes.set(yscale="log", xlabel="rows seen", ylabel="rows", title="Noise scale and batch")
    axes.legend()


def _draw_progress(axes: Axes, last: dict[str, Any]) -> None:
    batch, low, value, high = (last[name] for name in ("batch/rows", "gns/low", "gns/value", "gns/high"))
    axes.set(xscale="log", xlabel="batch, rows", ylabel="progress per row", ylim=(0, 1.05))
    axes.set_title("What a row teaches, by the model")
    axes.axvline(batch, color="black", linestyle="--", label="batch")
    if low is not None and low > 0:
        calibration = last["batch/calibration"]
        batches = np.geomspace(
            min(batch, NOISE_LIMITED * low * calibration) / 4, max(batch, high * calibration) * 4, 200
        )
        under, at, over = (1 / (1 + batches / (calibration * scale)) for scale in (low, value, high))
        axes.fill_between(batches, under, over, alpha=0.25, linewidth=0)
        axes.plot(batches, at, label="1 / (1 + batch / noise scale)")
        for fill in (NOISE_LIMITED, SIGNAL_LIMITED):
            axes.axvline(fill * value * calibration, color="gray", linestyle=":", label=f"fill {fill:g}")
    else:
        axes.text(0.5, 0.5, "inconclusive", transform=axes.transAxes, ha="center")
    axes.legend()


def _draw_parts(axes: Axes, events: Sequence[dict[str, Any]]) -> None:
    rows = _column(events, "rows_seen")
    for name, label in (("gns/signal_sq", "signal |G|$^2$"), ("gns/trace", "noise of a row, tr $\\Sigma$")):
        samples = _column(events, name)
        line = axes.plot(rows, samples, ".", markersize=3, alpha=0.35)[0]
        axes.plot(rows, _running_mean(samples), color=line.get_color(), label=label)
    axes.set(xlabel="rows seen", title="Signal and noise apart")
    # Signals may be negative: symlog is linear around zero.
    typical = float(np.median(np.abs(_column(events, "gns/trace"))))
    axes.set_yscale("symlog", linthresh=max(typical / 100, 1e-30), linscale=0.5)
    axes.legend()


def _draw_lambda(axes: Axes, events: Sequence[dict[str, Any]]) -> None:
    rows, values = _column(events, "rows_seen"), _column(events, "gns/lambda")
    certain = _column(events, "gns/lambda_conclusive") == 1
    axes.plot(rows, values, color="gray", linewidth=0.8)
    axes.plot(rows[certain], values[certain], "o", label="conclusive")
    axes.plot(rows[~certain], values[~certain], "o", fillstyle="none", color="gray", label="inconclusive")
    axes.axhline(1, color="black", linestyle="--")
    axes.set(xlabel="rows seen", title="Noise scale: frozen weights / adapters")
    axes.legend()


def _running_mean(samples: np.ndarray) -> np.ndarray:
    """The mean of each sample and the 24 before it, or as many as there are."""
    sums = np.cumsum(np.insert(samples, 0, 0.0))
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - 25, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
