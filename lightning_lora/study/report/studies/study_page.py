"""The report of a study, finished or not."""

from __future__ import annotations

from lightning_lora.study.matched.record import StudyRecord
from lightning_lora.study.report.content import Page
from lightning_lora.study.report.studies.study_arms import study_arms
from lightning_lora.study.report.studies.study_curves import study_curves
from lightning_lora.study.report.studies.study_facts import StudyFacts
from lightning_lora.study.report.studies.study_monitors import study_monitors
from lightning_lora.study.report.studies.study_origin import study_limits, study_origin
from lightning_lora.study.report.studies.study_rates import failures, study_rates
from lightning_lora.study.report.studies.study_verdicts import study_lede, study_verdict, study_verdicts


def study_page(study: StudyRecord) -> Page:
    """All that is told of a study."""
    facts = StudyFacts(study)
    sections = (
        study_verdicts(facts),
        study_arms(facts),
        study_curves(facts),
        study_rates(facts),
        study_monitors(facts),
        failures(facts),
        study_origin(facts),
        study_limits(facts),
    )
    return Page(
        f"study {study.spec.get('name', study.folder.name)}",
        study_verdict(facts),
        list(study_lede(facts)),
        [section for section in sections if section is not None],
        "unfinished" if facts.over < len(study.cells) else "",
    )
