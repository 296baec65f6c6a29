"""The report of one run."""

from __future__ import annotations

from lightning_lora.study.report.content import Page
from lightning_lora.study.report.runs.batch_panel import batch_panel
from lightning_lora.study.report.runs.capacity_panel import capacity_panel
from lightning_lora.study.report.runs.run_curves import run_curves
from lightning_lora.study.report.runs.run_health import health_log, planned_and_measured
from lightning_lora.study.report.runs.run_origin import limits, origin
from lightning_lora.study.report.runs.run_record import RunRecord
from lightning_lora.study.report.runs.run_summary import run_lede, run_settings, run_verdict, run_word
from lightning_lora.study.report.task_panel import task_panel


def run_page(run: RunRecord) -> Page:
    """All that is told of a run."""
    sections = (
        run_curves(run),
        run_settings(run),
        planned_and_measured(run),
        batch_panel(run),
        capacity_panel(run),
        task_panel(run.folder, {}),
        health_log(run),
        origin(run),
        limits(run),
    )
    folder = run.folder.absolute()
    return Page(
        f"{folder.parent.name}/{folder.name}",
        run_verdict(run),
        list(run_lede(run)),
        [section for section in sections if section is not None],
        "running" if run.ending == "running" else "",
        *run_word(run),
    )
