"""``evaluate`` benchmarks the models that the runs of a study have kept, and puts them into its report."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lightning_lora.cli.commands import run_command
from lightning_lora.errors import ConfigError, DataError
from lightning_lora.study.matched.record import read_study
from lightning_lora.study.report.table import cells_of
from lightning_lora.study.report.write import write_report
from lightning_lora.study.tasks.record import read_tasks
from tests.study.report.html_page import HtmlPage
from tests.study.report.planted_study import BASELINE, plant
from tests.study.tasks.planted import stand_in

ARM = "rank 8"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished study that has kept whole models, and a package in the place of lm-eval."""
    place = str(stand_in(tmp_path / "site"))
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("PYTHONPATH", f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    folder = plant(tmp_path / "study", {ARM: 0.0})
    found = read_study(folder)
    for arm, right in ((BASELINE, 40), (ARM, 10)):
        for cell in found.cells_of(arm, "verdict"):
            model = found.run_folder(cell) / "model"
            model.mkdir()
            (model / "config.json").write_text("{}")
            (model / "right.txt").write_text(str(right + cell.seed % 2))
    return folder


def test_models_of_a_study_are_compared_and_reported(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("evaluate", [str(study), "--tasks", "sums,more", "--limit", "50", "--device", "cpu"])
    told = capsys.readouterr().out
    assert f"6 of 6: {ARM}, seed 3: sums (acc) 22.0%; more (acc) 22.0%" in told
    assert f"{ARM} falls behind {BASELINE} by 60 points" in told
    found = read_tasks(study)
    assert found is not None
    _, page = write_report(study)
    cells = {(part, row, column): cell for part, row, column, cell in cells_of(page)}
    for number, verdict in enumerate(found["verdicts"]):
        assert cells[f"task-numbers-{number}", ARM, "points"].value == 100 * verdict["difference"] == pytest.approx(-60)
        assert cells[f"task-numbers-{number}", ARM, "low"].value == 100 * verdict["low"]
    assert cells["task-numbers-0", ARM, "points"].text == "-60.0"
    assert cells["task-scores", ARM, "highest seed"].text == "22.0%"
    (section,) = (each for each in page.sections if each.name == "tasks")
    assert "50 questions a task" in str(section.blocks[-1])
    HtmlPage((study / "report.html").read_text(encoding="utf-8"))


def test_names_of_tasks_and_arms_stay_texts(study: Path) -> None:
    run_command("evaluate", [str(study), "--tasks", "sums", "--limit", "50", "--device", "cpu"])
    file = study / "tasks" / "tasks.json"
    evil = '"><img src=x></script>'
    file.write_text(file.read_text().replace('"sums"', json.dumps(evil)).replace("on sums", f"on {evil[2:]}"))
    write_report(study)
    page = HtmlPage((study / "report.html").read_text(encoding="utf-8"))
    assert not page.all_of("img")
    assert any(evil in each.text for each in page.all_of("td"))


def test_a_study_that_has_kept_no_models_is_one_clear_error(study: Path) -> None:
    cell = read_study(study).cells_of(BASELINE, "verdict")[0]
    (study / "runs" / cell.run / "model" / "config.json").unlink()
    with pytest.raises(ConfigError, match=f"the runs of {BASELINE} have kept no model: .*study --keep-models"):
        run_command("evaluate", [str(study), "--tasks", "sums"])
    assert not (study / "tasks").exists()


def test_a_study_without_verdict_runs_is_one_clear_error(study: Path) -> None:
    lines = (study / "results.csv").read_text().splitlines(keepends=True)
    (study / "results.csv").write_text("".join(line for line in lines if ",verdict," not in line))
    with pytest.raises(ConfigError, match="finish the study first"):
        run_command("evaluate", [str(study), "--tasks", "sums"])


def test_damaged_results_of_tasks_are_one_clear_error(study: Path) -> None:
    (study / "tasks").mkdir()
    (study / "tasks" / "tasks.json").write_text("{}")
    with pytest.raises(DataError, match=r"tasks.json is damaged"):
        write_report(study)
