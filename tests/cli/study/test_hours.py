"""``--hours`` shortens the runs so that the whole study takes so long, by one plan of the fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lora.cli.study import command, default_study, estimate
from lightning_lora.cli.study.estimate import Estimate
from lightning_lora.errors import ConfigError
from lightning_lora.study.matched.spec import StudySpec
from tests.cli.study.test_study_command import BASE
from tests.support import toys

pytestmark = toys.expected_warnings


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``study --config`` up to its first run, with a plan of 100 steps in 600 s for each of 25 runs."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    plans: list[StudySpec] = []
    began: list[tuple[StudySpec, Estimate | None]] = []

    def plan(spec: StudySpec) -> Estimate:
        plans.append(spec)
        return Estimate(25, 100, 600.0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(default_study, "estimate", plan)
    monkeypatch.setattr(estimate, "estimate", plan)
    monkeypatch.setattr(command, "_work", lambda options, spec, estimated, others: began.append((spec, estimated)))

    def run(*arguments: str) -> tuple[StudySpec, Estimate | None]:
        command.run_study(["--config=base.yaml", *arguments], ())
        assert len(plans) == (1 if arguments else 0)
        return began[-1]

    return run


def test_runs_are_shortened_to_the_hours_by_one_plan(planned: Any) -> None:
    spec, estimated = planned("--hours", "1")
    assert {arm.config["trainer"]["max_steps"] for arm in spec.arms} == {24}
    assert estimated is not None
    assert (estimated.runs, estimated.steps) == (25, 24)
    assert estimated.total_seconds == pytest.approx(3600)
    assert [arm.name for arm in spec.arms] == ["full fine-tuning", "rank 4", "rank 32"]


def test_without_hours_the_runs_stay_as_they_are(planned: Any) -> None:
    spec, estimated = planned()
    assert {arm.config["trainer"]["max_steps"] for arm in spec.arms} == {-1}
    assert estimated is None


def test_hours_that_are_too_few_name_those_that_would_do(planned: Any) -> None:
    with pytest.raises(ConfigError, match=r"in 0\.1 hours each of about 25 runs would take 2 steps.*--hours 0\.83 or"):
        planned("--hours", "0.1")
