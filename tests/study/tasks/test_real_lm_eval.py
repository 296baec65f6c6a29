"""The real lm-eval takes our config, and its samples are read: the embedded model on a task of our own, offline."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from lightning_lora.study.tasks.lm_eval_run import run_lm_eval
from lightning_lora.study.tasks.samples import read_scores
from lightning_lora.study.tasks.settings import TaskSettings
from tests.support import toys

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: extra eval"),
]


def test_the_embedded_model_answers_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"question": f"{n} + 1", "choices": [str(n + 1), str(n + 2)], "label": 0} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "plus_one",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} =",
        "doc_to_target": "label",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "plus_one.yaml").write_text(yaml.safe_dump(task))
    settings = TaskSettings(("plus_one",), limit=4, num_fewshot=0, device="cpu", task_folder=str(tmp_path))
    run_lm_eval(settings, toys.ROOT / "lightning_lora" / "assets" / "tiny-base", tmp_path / "out")
    found = read_scores(tmp_path / "out")
    assert list(found) == [("plus_one", "acc")]
    assert len(found["plus_one", "acc"].values) == 4
    assert set(found["plus_one", "acc"].values) <= {0.0, 1.0}
