"""The real lm-eval takes our config, and its samples are read: the embedded model on a task of our own, offline."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lora.errors import ConfigError
from lightning_lora.study.tasks.lm_eval_run import run_lm_eval
from lightning_lora.study.tasks.samples import read_scores
from lightning_lora.study.tasks.settings import TaskSettings
from tests.support import toys

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: extra eval"),
]


MODEL = toys.ROOT / "lightning_lora" / "assets" / "tiny-base"
GSM8K = {
    "task": "sums",
    "dataset_path": "json",
    "output_type": "generate_until",
    "training_split": "train",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 8},
    "num_fewshot": 1,
    "filter_list": [
        {
            "name": name,
            "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}],
        }
        for name, pattern in (("strict-match", r"#### (\-?[0-9]+)"), ("flexible-extract", r"(-?[0-9]+)"))
    ],
}
"""As lm-eval asks GSM8K: worked examples, a text that is generated, and two ways to read the answer."""


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


def write_task(folder: Path, task: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(folder / "rows.jsonl") for split in ("train", "test")}
    (folder / "task.yaml").write_text(yaml.safe_dump(task | {"dataset_kwargs": {"data_files": files}}))


def sums(count: int = 4) -> list[dict[str, Any]]:
    return [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(count)]


def test_the_embedded_model_answers_questions(tmp_path: Path) -> None:
    rows = [{"question": f"{n} + 1", "choices": [str(n + 1), str(n + 2)], "label": 0} for n in range(6)]
    task = {
        "task": "plus_one",
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} =",
        "doc_to_target": "label",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    write_task(tmp_path, task, rows)
    settings = TaskSettings(("plus_one",), limit=4, num_fewshot=0, device="cpu", task_folder=str(tmp_path))
    run_lm_eval(settings, MODEL, tmp_path / "out")
    found = read_scores(tmp_path / "out")
    assert list(found) == [("plus_one", "acc")]
    assert len(found["plus_one", "acc"].values) == 4
    assert set(found["plus_one", "acc"].values) <= {0.0, 1.0}


def test_both_readings_of_a_generated_answer_are_scores(tmp_path: Path) -> None:
    write_task(tmp_path, GSM8K, sums())
    run_lm_eval(TaskSettings(("sums",), limit=2, device="cpu", task_folder=str(tmp_path)), MODEL, tmp_path / "out")
    found = read_scores(tmp_path / "out")
    assert len(found) == 2
    assert {len(scores.values) for scores in found.values()} == {2}


def test_programs_of_a_model_need_the_flag(tmp_path: Path) -> None:
    write_task(tmp_path, GSM8K | {"unsafe_code": True}, sums())
    settings = TaskSettings(("sums",), limit=1, device="cpu", task_folder=str(tmp_path))
    with pytest.raises(ConfigError, match=r"of the tasks sums some run programs .* --allow-code-execution allows it"):
        run_lm_eval(settings, MODEL, tmp_path / "refused")
    run_lm_eval(replace(settings, allow_code_execution=True), MODEL, tmp_path / "out")
    assert read_scores(tmp_path / "out")


def test_humaneval_is_refused_without_the_flag_although_it_fails_at_the_hub_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of the tasks humaneval some run programs"):
        run_lm_eval(TaskSettings(("humaneval",), limit=1, device="cpu"), MODEL, tmp_path / "out")
