"""The report of a study gives the words of its verdicts, whatever they are, and says what is not finished."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from lightning_lora.errors import DataError
from lightning_lora.study.matched.record import FURTHER, RESULTS, STUDY, VERDICTS, read_study
from lightning_lora.study.report.content import Page, Table, figures_of
from lightning_lora.study.report.studies.study_page import study_page
from lightning_lora.study.report.table import cells_of
from lightning_lora.study.report.write import write_report
from tests.study.report.planted_run import plant_run
from tests.study.report.planted_study import BASELINE, plant
from tests.support import toys

WORDS = {"matches": "Matches", "behind": "Falls behind", "ahead": "Is ahead", "cannot tell": "Cannot tell"}


def page_of(folder: Path) -> Page:
    return study_page(read_study(folder))


@pytest.mark.parametrize(
    ("gap", "settings", "sentence"),
    [
        (0.0, {}, f"rank 8 matches {BASELINE} within 0.005 nats"),
        (0.04, {}, f"rank 8 falls behind {BASELINE} by 0.04"),
        (-0.04, {}, f"rank 8 is ahead of {BASELINE} by 0.0"),
        (0.0, {"spread": 0.05}, f"Cannot tell whether rank 8 matches {BASELINE}: 3 seeds"),
        (0.0, {"seeds": 2}, f"Cannot tell whether rank 8 matches {BASELINE}: 2 seeds"),
        (0.0, {"failed": {("rank 8", 2): "NaN"}}, f"{BASELINE}: rank 8 has no result for seed 2"),
        (0.0, {"problem": {"rank 8": "best rate at the edge of the sweep"}}, "edge of the sweep"),
    ],
)
def test_the_first_sentence_is_the_main_verdict(gap: float, settings: dict, sentence: str, tmp_path: Path) -> None:
    page = page_of(plant(tmp_path, {"rank 8": gap}, **settings))
    assert sentence in f"{page.verdict.text}: {page.lede[0].text}"
    assert sentence in str(page.sections[0])
    assert page.word == WORDS[read_study(tmp_path).verdicts[0]["verdict"]]
    assert page.state == ""


def test_numbers_of_the_table_are_those_of_the_study(tmp_path: Path) -> None:
    study = read_study(plant(tmp_path, {"rank 1": 0.03, "rank 8": 0.001}))
    cells = {(part, row, column): cell for part, row, column, cell in cells_of(study_page(study))}
    for verdict in study.verdicts:
        assert cells["arm-table", verdict["arm"], "difference"].value == verdict["difference"]
        assert cells["verdict-numbers", verdict["arm"], "low"].value == verdict["low"]
    runs = [cell for cell in study.cells_of("rank 1", "verdict") if cell.loss is not None]
    assert cells["arm-table", "rank 1", "worst seed"].value == max(run.loss or 0 for run in runs)
    assert cells["arm-table", "rank 1", "loss"].value == pytest.approx(sum(run.loss or 0 for run in runs) / len(runs))
    assert cells["arm-table", "rank 1", "rate"].text == "3e-4"
    assert cells["u-curves", "rank 1", "0.0003"].value == pytest.approx(1.43)


def test_every_chart_is_there_and_says_its_result(tmp_path: Path) -> None:
    page = page_of(plant(tmp_path, {"rank 1": 0.03, "rank 8": 0.001}))
    found = {figure.name: figure for figure in figures_of(page)}
    assert set(found) == {"differences", "by-rank", "curve-steps", "curve-tokens", "curve-seconds", "u-curves"}
    assert "rank 1 +0.03" in found["differences"].says
    assert "Chosen, with a ring: full fine-tuning 3e-4" in found["u-curves"].says
    assert str(found["u-curves"].svg).count('class="pin ring"') == 3
    # Three seeds are thin lines, their mean a thick one, in every arm.
    assert str(found["curve-tokens"].svg).count('class="thin"') == 9
    assert str(found["curve-tokens"].svg).count('class="line"') == 3


def test_failed_runs_have_their_reasons(tmp_path: Path) -> None:
    page = page_of(plant(tmp_path, {"rank 8": 0.0}, failed={("rank 8", 1): "out of memory"}))
    assert "1 of 13 runs failed" in " ".join(words.text for words in page.lede)
    (section,) = (section for section in page.sections if section.name == "failed")
    assert "out of memory" in str(section)


def test_a_study_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    folder = plant(tmp_path, {"rank 8": 0.0})
    (folder / VERDICTS).unlink()
    lines = (folder / RESULTS).read_text().splitlines(keepends=True)
    waiting = [line.replace(",done,", ",ready,") for line in lines[3:]]
    (folder / RESULTS).write_text("".join([*lines[:3], *waiting]))
    _, page = write_report(folder)
    assert page.verdict.text == "No verdict yet: 2 of 13 runs are over"
    assert page.state == "unfinished"


def test_a_study_before_its_first_run_has_a_report(tmp_path: Path) -> None:
    folder = plant(tmp_path, {"rank 8": 0.0})
    (folder / VERDICTS).unlink()
    (folder / RESULTS).unlink()
    assert write_report(folder)[1].verdict.text == "No verdict yet: 0 of 0 runs are over"


def test_a_damaged_study_is_one_clear_error(tmp_path: Path) -> None:
    folder = plant(tmp_path, {"rank 8": 0.0})
    (folder / STUDY).write_text("name: [")
    with pytest.raises(DataError, match="cannot be read as a study"):
        write_report(folder)


def test_what_monitors_said_is_told_by_arm_with_the_layers_of_the_main_one(tmp_path: Path) -> None:
    folder = plant(tmp_path, {"rank 1": 0.03, "rank 8": 0.001})
    study = read_study(folder)
    for arm in ("rank 1", "rank 8"):
        run = study.run_folder(study.cells_of(arm, "verdict")[0])
        (run / "curve.csv").unlink()
        run.rmdir()
        plant_run(run)
    page = page_of(folder)
    cells = {(part, row, column): cell for part, row, column, cell in cells_of(page)}
    assert cells["monitors", "rank 1", "batch"].text == "noise-limited"
    assert cells["monitors", "rank 8", "noise scale, rows"].value == 140.0
    (section,) = (section for section in page.sections if section.name == "capacity")
    tables = {block.caption: block for block in section.blocks if isinstance(block, Table)}
    assert not tables["Layers by role of rank 8, seed 1"].is_folded
    assert tables["Layers by role of rank 1, seed 1"].is_folded
    assert cells["ranks", "rank 8", "gain lost at half rank"].text == "6.0%"


def test_a_report_of_a_study_may_be_written_elsewhere(tmp_path: Path) -> None:
    folder = plant(tmp_path / "study", {"rank 8": 0.0})
    before = toys.tree(folder)
    out, _ = write_report(folder, out=tmp_path / "docs" / "finding")
    assert sorted(file.name for file in out.iterdir()) == ["report.csv", "report.html", "report.md"]
    assert toys.tree(folder) == before


def test_a_study_says_how_it_was_made(tmp_path: Path) -> None:
    (section,) = (each for each in page_of(plant(tmp_path, {"rank 8": 0.0})).sections if each.name == "reproduce")
    told = str(section)
    assert "lightning-lora study planted.yaml" in told
    assert "torch 2.13.0, lightning 2.6.6" in told
    assert "ab" * 32 in told
    assert told.count("cd" * 32) == 2, "the value and its text"


def test_a_long_reason_does_not_fill_the_title(tmp_path: Path) -> None:
    reason = "no setting of this name; known are " + ", ".join(f"setting_{number}" for number in range(100))
    page = page_of(plant(tmp_path, {"rank 8": 0.0}, failed={("rank 8", 1): reason}))
    assert len(page.verdict.text) <= 200
    assert len(page.lede[0].text) <= 201
    assert page.lede[0].text.endswith(" …")
    assert "setting_99" in str(page.sections[0])


def test_numbers_of_a_study_that_are_no_verdicts_have_tables(tmp_path: Path) -> None:
    cells = {(part, row, column): cell for part, row, column, cell in cells_of(page_of(plant(tmp_path, {"rank 8": 0})))}
    assert cells["steps", "rank 8", "steps, times the baseline's"].text == ">= 1.25x"
    assert cells["steps", "rank 8", "high"].text == "-"
    assert cells["arm-table", "rank 8", "steps to 90%"].value == 1.25
    assert cells["expected-best", "rank 8", "2 rates"].value == 1.42
    assert cells["ranks", "rank 8", "trained tokens per parameter"].value == 40_000 / 950_000


def test_the_noise_floor_and_the_price_of_a_large_batch_are_told(tmp_path: Path) -> None:
    folder = plant(tmp_path, {"rank 8": 0.0})
    found = {"difference": 0.002, "low": -0.001, "high": 0.005, "verdict": "cannot tell"}
    penalty = found | {"sentence": "cannot tell: 3 seeds; 6 would do"}
    (folder / FURTHER).write_text(json.dumps({"noise_floor": found | {"run_spread": 0.01}, "batch_penalty": penalty}))
    page = page_of(folder)
    text = " ".join(str(section) for section in page.sections)
    assert f"{BASELINE} differs from itself, with other seeds, by +0.0020 (-0.0010 to +0.0050) nats" in text
    assert "Its single runs spread by 0.0100 nats" in text
    assert "Cannot tell whether a large batch costs adapters more than full fine-tuning: 3 seeds; 6 would do." in text
    assert "Difference of differences, nats: +0.0020 (-0.0010 to +0.0050)" in text


def test_what_the_band_means_is_said_with_the_spreads_of_the_study(tmp_path: Path) -> None:
    """The baseline is named, whatever it is: it may be an adapter."""
    study = read_study(plant(tmp_path, {"rank 8": 0.0}, spread=0.004))
    page = study_page(study)
    text = " ".join(str(section) for section in page.sections)
    assert f"{BASELINE[:1].upper()}{BASELINE[1:]} gained 0.9800 nats; the band is 0.5% of that." in text
    assert f"ingle runs of {BASELINE} spread by 0.0100 nats" in text
    spread = study.verdicts[0]["spread"]
    assert f"With a spread of {spread:.4f} nats between seeds" in text
    cells = {(part, row, column): cell for part, row, column, cell in cells_of(page)}
    assert cells["verdict-numbers", "rank 8", "inside the band"].value == study.verdicts[0]["inside_band"]
    (tmp_path / STUDY).write_text((tmp_path / STUDY).read_text().replace(f"baseline: {BASELINE}", "baseline: rank 8"))
    assert "Rank 8 gained" in str(page_of(tmp_path).sections)


def test_losses_against_the_batch_are_a_line_for_each_way_to_train(tmp_path: Path) -> None:
    folder = plant(tmp_path, {"full, batch 64": 0.01, "rank 8, batch 8": 0.001, "rank 8, batch 64": 0.05})
    study = yaml.safe_load((folder / STUDY).read_text())
    lora = {"rank": 8, "alpha": 32.0}
    for number, name in enumerate([BASELINE, "full, batch 64", "rank 8, batch 8", "rank 8, batch 64"]):
        data = {"init_args": {"batch_size": 64 if "64" in name else 8, "train": "rows.jsonl"}}
        model = {"init_args": {"lora": None if number < 2 else lora}}
        study["arms"][name] |= {"config": {"model": model, "data": data, "trainer": {}}, "overrides": {}}
    (folder / STUDY).write_text(yaml.safe_dump(study, sort_keys=False))
    page = page_of(folder)
    (figure,) = (each for each in figures_of(page) if each.name == "by-batch")
    assert list(figure.legend) == ["full", "rank 8"]
    assert [x for x, _ in figure.points["rank 8"]] == [8.0, 64.0]
    cells = {(part, row, column): cell for part, row, column, cell in cells_of(page)}
    assert cells["batches", "rank 8, batch 64", "loss"].value == cells["arm-table", "rank 8, batch 64", "loss"].value
    # One rank only: no line over ranks.
    assert not [each for each in figures_of(page) if each.name == "by-rank"]


def test_what_failed_or_cannot_be_trusted_is_marked_on_the_sweep(tmp_path: Path) -> None:
    folder = plant(tmp_path, {"rank 1": 0.03, "rank 8": 0.0}, problem={"rank 1": "best rate at the edge of the sweep"})
    lines = (folder / RESULTS).read_text()
    place = next(line for line in lines.splitlines() if line.startswith("rank 8,0.0009,0"))
    parts = place.split(",")
    failed = ",".join([*parts[:3], "failed", "", *parts[5:]])
    (folder / RESULTS).write_text(lines.replace(place, failed))
    (figure,) = (each for each in figures_of(page_of(folder)) if each.name == "u-curves")
    assert "cannot carry a verdict (rank 1)" in figure.says
    assert "Crosses at the top: failed or diverged, rank 8 9e-4." in figure.says
    marks = [str(figure.svg).count(f'class="pin {kind}"') for kind in ("ring", "ring edge", "cross-mark")]
    assert marks == [2, 1, 1]


def test_envelopes_are_off_at_first_and_named_as_no_run(tmp_path: Path) -> None:
    (figure,) = (each for each in figures_of(page_of(plant(tmp_path, {"rank 8": 0.0}))) if each.name == "curve-steps")
    names = [figure.legend[number] for number in figure.off]
    assert names == [f"{arm}: best of 3 rates at each step; no single run" for arm in (BASELINE, "rank 8")]
    heights = dict(figure.points[f"{names[1]} (thin)"])
    assert heights[100.0] == pytest.approx(1.4 + (2.4 - 1.4) * math.exp(-100 / 24))
