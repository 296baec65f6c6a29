"""The report of a run says what its folder says: how it ended, what was measured, what is missing."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.errors import DataError
from lightning_lora.files.folder_lock import release_lock, take_lock
from lightning_lora.study.report import watch as watching
from lightning_lora.study.report.content import Page, Table, figures_of
from lightning_lora.study.report.runs.losses import LossCurve, read_losses
from lightning_lora.study.report.runs.run_page import run_page
from lightning_lora.study.report.runs.run_record import read_run
from lightning_lora.study.report.table import cells_of
from lightning_lora.study.report.watch import watch
from lightning_lora.study.report.write import CSV, HTML, write_report
from tests.study.report.planted_run import plant_run
from tests.study.report.planted_study import plant


def page_of(folder: Path) -> Page:
    return run_page(read_run(folder))


def text_of(page: Page) -> str:
    return " ".join([page.verdict.text, *(words.text for words in page.lede)])


def names(page: Page) -> list[str]:
    return [section.name for section in page.sections]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("done", "The run is finished."),
        ("stopped", "The run was stopped before its end"),
        ("failed", "The run failed: ValueError: <b>no</b>"),
        ("", "it was killed, or the machine stopped"),
    ],
)
def test_a_report_says_how_the_run_ended(how: str, words: str, tmp_path: Path) -> None:
    assert words in text_of(page_of(plant_run(tmp_path / "run", how=how)))


def test_a_run_whose_lock_is_held_goes_on(tmp_path: Path) -> None:
    folder, lock = plant_run(tmp_path / "run", how=""), tmp_path / ".run.lock"
    take_lock(lock, folder)
    assert page_of(folder).state == "running"
    assert "The run goes on; these are the numbers so far, at step 60 of 80." in text_of(page_of(folder))
    holder = json.loads(lock.read_text())
    lock.write_text(json.dumps(holder | {"born": "another process"}))
    assert page_of(folder).state == ""
    assert "killed" in text_of(page_of(folder))


def test_the_verdict_and_the_curves_are_the_losses_of_the_folder(tmp_path: Path) -> None:
    folder = plant_run(tmp_path / "run")
    losses, page = read_losses(folder), page_of(folder)
    assert page.verdict.text == (
        f"Validation loss fell from {losses.validation[20]:.4f} at step 20 to {losses.validation[60]:.4f} nats at step "
        "60"
    )
    drawn = {(part, row, column): cell.value for part, row, column, cell in cells_of(page)}
    for step, loss in losses.validation.items():
        tokens, seconds = losses.effort[step]
        assert drawn["loss-steps", "validation", f"{step:.6g}"] == loss
        assert drawn["loss-tokens", "validation", f"{tokens:.6g}"] == loss
        assert drawn["loss-seconds", "validation", f"{seconds:.6g}"] == loss


def test_the_lowest_loss_is_told_apart_from_the_last(tmp_path: Path) -> None:
    folder = plant_run(tmp_path / "run")
    curve = read_losses(folder)
    curve.validation[60] = 3.0
    curve.write(folder / "curve.csv")
    page = page_of(folder)
    assert f"; the lowest was {curve.validation[40]:.4f} at step 40" in page.verdict.text
    assert "rose" in page.verdict.text or "fell" in page.verdict.text


def test_panels_are_there_for_what_was_watched_and_limits_for_what_was_not(tmp_path: Path) -> None:
    watched, bare = (page_of(plant_run(tmp_path / str(each), monitors=each)) for each in (True, False))
    assert names(watched) == ["loss", "run", "plan", "batch", "capacity", "health", "reproduce", "limits"]
    assert names(bare) == ["loss", "run", "health", "reproduce", "limits"]
    limits = {each: str(page.sections[-1]) for each, page in (("watched", watched), ("bare", bare))}
    assert "CapacityMonitor" in limits["bare"]
    assert "BatchSizeMonitor" in limits["bare"]
    assert "Monitor does" not in limits["watched"]
    cells = {(part, row, column): cell for part, row, column, cell in cells_of(watched)}
    assert cells["planned", "seconds", "difference"].text == "+50%"
    assert cells["planned", "optimizer steps", "difference"].text == "0%"
    charts = {figure.name: figure.says for figure in figures_of(watched)}
    assert charts["capacity-capture"].startswith("Tangent capture is 0.80 (0.70 to 0.90) at step 60; full adapters")
    assert charts["capacity-shares"].startswith("Half of the rank loses 6.0% of what the adapters gained, at step 60")
    # Layers in the order of the model, not of their names.
    blocks = [block for section in watched.sections for block in section.blocks]
    (heat,) = (block for block in blocks if isinstance(block, Table) and block.name == "layers")
    assert [row[0].text for row in heat.rows] == [f"layer {number}" for number in range(12)]


def test_losses_that_are_no_numbers_are_in_the_log_and_break_the_line(tmp_path: Path) -> None:
    folder = plant_run(tmp_path / "run", monitors=False)
    curve = read_losses(folder)
    curve.train[30] = float("nan")
    curve.write(folder / "curve.csv")
    page = page_of(folder)
    health = next(section for section in page.sections if section.name == "health")
    assert "the training loss is not a finite number" in str(health)
    assert figures_of(page)
    assert not [figure.name for figure in figures_of(page) if "nan" in str(figure.svg)]


def test_a_run_of_a_csv_logger_alone_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train_loss,val_loss\n0,0,2.5,\n0,1,2.0,\n0,1,,1.9\n")
    folder, page = write_report(tmp_path)
    assert page.verdict.text == "Validation loss is 1.9000 at step 2"
    assert "Tokens and seconds were not recorded" in str(page.sections)
    with (folder / CSV).open(newline="") as file:
        assert {row["value"] for row in csv.DictReader(file) if row["part"] == "loss-steps"} >= {"2.5", "2.0", "1.9"}


def test_a_curve_survives_its_file(tmp_path: Path) -> None:
    curve = LossCurve({1: 2.0, 2: 1.5}, {2: float("nan")}, effort={1: (10, 0.5), 2: (20, 1.0)})
    curve.write(tmp_path / "curve.csv")
    found = read_losses(tmp_path)
    assert (found.train, found.effort) == (curve.train, curve.effort)
    assert list(found.validation) == [2]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda top: top / "nowhere", "does not exist"),
        (lambda top: Path(__file__), "is a file"),
        (lambda top: top, "holds no run and no study"),
        (lambda top: [plant_run(top / name, 3) for name in "ab"] and top, "holds 2 runs: give one of them"),
        (
            lambda top: [plant(top / name, {"rank 8": 0.0}) for name in "ab"] and top,
            "holds 2 studies: give one of them",
        ),
    ],
)
def test_a_folder_that_is_no_run_is_one_clear_error(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        write_report(make(tmp_path))
    assert not list(tmp_path.rglob("report.*"))


def test_a_single_run_below_is_found(tmp_path: Path) -> None:
    plant_run(tmp_path / "runs" / "sft" / "version_0", 3)
    assert write_report(tmp_path)[0] == tmp_path / "runs" / "sft" / "version_0"


def test_a_damaged_file_is_one_clear_error_and_the_old_report_stays(tmp_path: Path) -> None:
    folder = plant_run(tmp_path / "run", 3)
    write_report(folder)
    before = (folder / HTML).read_bytes()
    (folder / "curve.csv").write_text("step,tokens,seconds,train_loss,val_loss\n1,x,0,,\n")
    with pytest.raises(DataError, match=r"run.metrics\.csv or curve\.csv is damaged: ValueError"):
        write_report(folder)
    assert (folder / HTML).read_bytes() == before


def test_a_damaged_probe_is_left_out_with_its_reason(tmp_path: Path) -> None:
    folder = plant_run(tmp_path / "run", 3)
    (folder / "batch_probe.json").write_text("{}")
    health = next(section for section in page_of(folder).sections if section.name == "health")
    assert "Left out: " in str(health)
    assert "batch_probe.json" in str(health)


def test_a_watched_page_reads_itself_again_until_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lock, pages = plant_run(tmp_path / "run", how=""), tmp_path / ".run.lock", []
    take_lock(lock, folder)

    def sleep(seconds: float) -> None:
        pages.append((folder / HTML).read_text())
        if len(pages) == 2:
            with (folder / "events.jsonl").open("a") as file:
                file.write('{"event": "ended", "step": 60, "how": "done"}\n')
            release_lock(lock)

    monkeypatch.setattr(watching.time, "sleep", sleep)
    lines: list[str] = []
    assert watch(folder, lines.append)[1].state == ""
    assert len(lines) == 1
    assert f"open {folder / HTML}" in lines[0]
    assert len(pages) == 2
    assert all('data-reload="10"' in page for page in pages)
    # Nothing had changed: the page was not made again.
    assert pages[0] == pages[1]
    last = (folder / HTML).read_text()
    assert "data-reload" not in last
    assert "The run is finished." in last
    assert os.listdir(tmp_path) == ["run"]
