"""The report of a study, finished or not."""

from __future__ import annotations

from lightning_lora.study.matched.record import StudyRecord
from lightning_lora.study.report.content import Page
from lightning_lora.study.report.studies.study_arms import study_arms
from lightning_lora.study.report.studies.study_batch import study_batch
from lightning_lora.study.report.studies.study_capacity import study_capacity
from lightning_lora.study.report.studies.study_curves import study_curves
from lightning_lora.study.report.studies.study_facts import StudyFacts
from lightning_lora.study.report.studies.study_health import study_health
from lightning_lora.study.report.studies.study_origin import study_limits, study_origin
from lightning_lora.study.report.studies.study_rates import study_rates
from lightning_lora.study.report.studies.study_verdicts import (
    differences,
    study_lede,
    study_verdict,
    study_verdicts,
    study_word,
)
from lightning_lora.study.report.task_panel import task_panel


def study_page(study: StudyRecord) -> Page:
    """All that is told of a study."""
    facts = StudyFacts(study)
    sections = (
        study_verdicts(facts),
        study_arms(facts),
        study_curves(facts),
        study_rates(facts),
        study_capacity(facts),
        study_batch(facts),
        task_panel(study.folder, facts.styles, study.primary),
        study_health(facts),
        study_origin(facts),
        study_limits(facts),
    )
    word, tone = study_word(facts)
    return Page(
        f"study {study.spec.get('name', study.folder.name)}",
        study_verdict(facts),
        list(study_lede(facts)),
        [section for section in sections if section is not None],
        "unfinished" if facts.over < len(study.cells) else "",
        word,
        tone,
        differences(facts),
    )
