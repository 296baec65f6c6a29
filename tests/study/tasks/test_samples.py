"""Scores are read from files that lm-eval 0.4.13 wrote for the embedded model and two tasks of our own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lightning_lora.errors import DataError
from lightning_lora.study.tasks.samples import read_scores

RECORDED = Path(__file__).parent / "recorded"


def test_scores_by_question_are_those_of_lm_eval() -> None:
    (results,) = RECORDED.glob("results_*.json")
    told = json.loads(results.read_text())["results"]
    found = read_scores(RECORDED)
    assert set(found) == {
        ("sums", "exact_match, strict-match"),
        ("sums", "exact_match, flexible-extract"),
        ("sums_choice", "acc"),
    }
    assert found["sums_choice", "acc"].mean == pytest.approx(told["sums_choice"]["acc,none"])
    assert found["sums", "exact_match, strict-match"].mean == told["sums"]["exact_match,strict-match"]
    choice = found["sums_choice", "acc"]
    assert len(choice.questions) == len(set(choice.questions)) == 6
    assert choice.losses == [1 - value for value in choice.values]
    # All metrics of a task are about the same questions.
    assert (
        found["sums", "exact_match, strict-match"].questions == found["sums", "exact_match, flexible-extract"].questions
    )


def test_a_metric_of_which_less_is_better_is_a_loss_itself(tmp_path: Path) -> None:
    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    (results,) = tmp_path.glob("results_*.json")
    whole = json.loads(results.read_text())
    whole["higher_is_better"]["sums_choice"]["acc"] = False
    results.write_text(json.dumps(whole))
    found = read_scores(tmp_path)["sums_choice", "acc"]
    assert found.losses == list(found.values)


def test_only_the_latest_evaluation_counts(tmp_path: Path) -> None:
    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    for file in list(tmp_path.iterdir()):
        old = file.with_name(file.name.replace("2026-11-27", "2025-01-01"))
        old.write_text(file.read_text().replace('"acc": 1.0', '"acc": 0.0'))
    assert read_scores(tmp_path)["sums_choice", "acc"].mean == pytest.approx(4 / 6)


def test_a_folder_without_results_has_no_scores(tmp_path: Path) -> None:
    assert read_scores(tmp_path) == {}


def test_damaged_results_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "results_2026-01-01T00-00-00.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as results of lm-eval"):
        read_scores(tmp_path)


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "results_1.json").write_text('{"configs": {"wiki": {}}}')
    row = {"doc_id": 0, "metrics": ["word_perplexity", "acc"], "word_perplexity": [-3.0, 7], "acc": True}
    (tmp_path / "samples_wiki_1.jsonl").write_text(json.dumps(row) + "\n")
    assert {name: each.values for name, each in read_scores(tmp_path).items()} == {("wiki", "acc"): (1.0,)}
