"""``--hours`` shortens the runs so that the whole study takes so long, by one plan of the fit."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.cli.study import command, default_study, estimate
from lightning_lora.cli.study.estimate import Estimate
from lightning_lora.cli.study.summary import before_begin
from lightning_lora.errors import ConfigError
from lightning_lora.study.matched.checks.work import Work
from lightning_lora.study.matched.spec import StudySpec, spec_of

Began = tuple[StudySpec, Estimate | None]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Began]:
    """``study --config`` up to its first run, where the plan of a fit has 100 steps in 600 s, for each of 25 runs."""
    began: list[Began] = []
    plans: list[StudySpec] = []

    def plan(spec: StudySpec) -> Estimate:
        plans.append(spec)
        work = Work(runs=25, steps=2500, lengths=25.0, passes=30)
        return Estimate(work, work, work, 100, 600.0, 20.0)

    def resolve(spec: StudySpec, configs: Any, overrides: Any, beside: Path, more: Sequence[str]) -> StudySpec:
        config: Mapping[str, Any] = {"trainer": {"arguments": list(more)}}
        return replace(spec, arms=tuple(replace(arm, config=config) for arm in spec.arms))

    def work(options: Namespace, spec: StudySpec, estimated: Estimate | None, others: Any) -> None:
        began.append((spec, estimated))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(default_study, "fit_config", lambda *_: {"model": {"init_args": {"lora": {"rank": 16}}}})
    monkeypatch.setattr(default_study, "resolve", resolve)
    for place in (default_study, estimate):
        monkeypatch.setattr(place, "estimate", plan)
    monkeypatch.setattr(command, "_work", work)
    for nothing in ("parser.restrict_imports", "quiet.tell_infos"):  # they change this process
        monkeypatch.setattr(f"lightning_lora.cli.{nothing}", lambda *_: None)

    def run(*arguments: str) -> Began:
        command.run_study(["--config=base.yaml", *arguments], ())
        assert len(plans) == len(arguments) // 2, "a fit is planned once, and only for --hours"
        return began[-1]

    return run


def test_runs_are_shortened_to_the_hours_by_one_plan(begin: Callable[..., Began]) -> None:
    spec, estimated = begin("--hours", "1")
    assert [arm.name for arm in spec.arms] == ["full fine-tuning", "rank 2", "rank 16"]
    assert all("--trainer.max_steps=20" in arm.config["trainer"]["arguments"] for arm in spec.arms)
    assert estimated is not None
    assert (estimated.mostly.runs, estimated.steps, estimated.mostly.steps) == (25, 20, 500)
    assert estimated.total_seconds == pytest.approx(3600), "600 s of them for scoring"


def test_without_hours_the_runs_stay_as_they_are(begin: Callable[..., Began]) -> None:
    spec, estimated = begin()
    assert {tuple(arm.config["trainer"]["arguments"]) for arm in spec.arms} == {("--config=base.yaml",)}
    assert estimated is None


def test_hours_that_are_too_few_name_those_that_would_do(begin: Callable[..., Began]) -> None:
    with pytest.raises(ConfigError, match=r"in 0\.2 hours each of about 25 runs would take 0 steps.*--hours 1 or"):
        begin("--hours", "0.2")


def test_the_cost_is_said_before_the_start() -> None:
    low, mostly, high = (Work(runs, 100 * runs, float(runs), passes) for runs, passes in ((20, 22), (25, 30), (40, 44)))
    spec, _, _ = spec_of({"arms": {"full": {}, "rank 8": {}}}, "ranks")
    lines = before_begin(spec, 25, 0, Path("out"), Estimate(low, mostly, high, 100, 60.0, 2.0, 3 * 10**9))
    assert lines[-2:] == [
        "20 to 40 runs, mostly about 25, of 100 steps, by plan 60 s and 3 GB of memory each; 22 to 44 passes over the "
        "held-out rows of 2 s",
        "21 min to 41 min for one worker, mostly 26 min, without loading",
    ]
    shorter = Estimate(low, mostly, high, 100, 60.0, 2.0, 3 * 10**9).with_steps(50)
    assert (shorter.run_seconds, shorter.peak_bytes, shorter.mostly.steps) == (30.0, 3 * 10**9, 1250)
