"""What a `BatchSizeMonitor`, an `AdaptiveAccumulation` or a `BatchProbe` has found about the batch of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lora.batch.reading import BatchReading, advice
from lightning_lora.effective_batch import EffectiveBatch
from lightning_lora.study.batch_probe_result import BatchProbeResult
from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.line_chart import Series, line_chart
from lightning_lora.study.report.content import Block, Figure, Listing, Section, Table, Words, said
from lightning_lora.study.report.numbers import count, nats, short, words
from lightning_lora.study.report.runs.run_record import RunRecord


def batch_panel(run: RunRecord) -> Section | None:
    """The panel; None if nothing watched the batch."""
    samples = samples_of_last_start(run)
    blocks: list[Block] = []
    if samples:
        blocks += [batch_state(samples[-1]), Words(_advice(samples[-1]))]
    if len(samples) > 1:
        blocks.append(_noise(samples))
    if samples:
        blocks.append(
            Words(
                "A noise scale shows a trend only; what a batch costs is measured by a probe, which tries others.",
                {},
                "note",
            )
        )
    if run.batch_probe:
        blocks += _probe(run.batch_probe)
    return Section("batch", "Batch size", blocks) if blocks else None


def samples_of_last_start(run: RunRecord) -> list[Mapping[str, Any]]:
    """Samples since the last start from step 0; if a run that was continued repeated a step, its latest one counts."""
    samples: dict[int, Mapping[str, Any]] = {}
    for event in run.events:
        if event["event"] == "batch" and event["step"] == 0:
            samples = {}
        elif event["event"] == "noise_scale":
            samples[event["step"]] = event
    return [samples[step] for step in sorted(samples)]


def batch_state(sample: Mapping[str, Any]) -> Words:
    """The state of the batch after a sample, with the numbers behind it."""
    low, high = sample.get("gns/low"), sample.get("gns/high")
    text = "The batch of {rows} rows is {state} after {measured} measured steps"
    text += ": noise scale {value} rows ({low} to {high})." if low is not None and high is not None else "."
    return said(
        text,
        rows=count(sample["batch/rows"]),
        state=words(str(sample["state"])),
        measured=count(sample["gns/n"]),
        value=short(sample["gns/value"]),
        low=short(low),
        high=short(high),
    )


def _advice(sample: Mapping[str, Any]) -> str:
    """What the state means for the batch, in the words of the monitor."""
    low, value, high = (sample.get(f"gns/{name}") for name in ("low", "value", "high"))
    rows, accumulation, calibration = sample["batch/rows"], sample["batch/k"], sample.get("batch/calibration") or 1.0
    fill, fill_high, fill_low = (
        rows / (calibration * scale) if scale is not None and scale > 0 else math.inf for scale in (value, low, high)
    )
    reading = BatchReading(sample["state"], fill, 0.0 if high is None else fill_low, fill_high)
    batch = EffectiveBatch(rows // accumulation, accumulation, 1)  # ranks count as rows of a micro-batch here
    steps = sample.get("batch/steps_total")
    text = advice(reading, batch, math.inf if steps is None else steps)
    return text[:1].upper() + text[1:]


def _noise(samples: Sequence[Mapping[str, Any]]) -> Figure:
    known = [s for s in samples if s["gns/low"] is not None and s["gns/low"] > 0 and s["gns/high"] is not None]
    rows = [(float(s["rows_seen"]), float(s["batch/rows"])) for s in samples]
    noise = Series(
        "noise scale",
        [(float(s["rows_seen"]), float(s["gns/value"])) for s in known],
        low=[float(s["gns/low"]) for s in known],
        high=[float(s["gns/high"]) for s in known],
    )
    series = [*([noise] if known else []), Series("batch", rows, style=1)]
    heights = [value for each in series for _, value in each.points] + [*noise.low, *noise.high]
    x = Axis.around("rows seen", [at for at, _ in rows], margin=0.02)
    y = Axis.around("rows", heights, is_log=True)
    says = batch_state(samples[-1]).text
    if not known:
        says += " No noise scale had a useful interval yet: the noise of the gradient hides its mean."
    return line_chart(
        "noise-scale", "Noise scale of the gradient with its 95 % interval, and the batch", says, x, y, series
    )


def _probe(probe: BatchProbeResult) -> list[Block]:
    rows = [[count(batch), nats(loss)] for batch, loss in probe.losses.items()]
    columns = ["rows per step", "held-out loss"]
    return [Table("batch-probe", "Batches tried by a probe", columns, rows), Listing("The probe", str(probe))]
