"""A benchmark evaluates each model once, in a process of its own, and runs code only if it is told to."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.study.tasks.benchmark import Model, benchmark
from lightning_lora.study.tasks.lm_eval_run import CODE, CONFIG, LOG, TRUST, config_of, environment_of, run_lm_eval
from lightning_lora.study.tasks.record import NO_SEED, read_tasks
from lightning_lora.study.tasks.settings import TaskSettings
from tests.study.tasks.planted import stand_in

SETTINGS = TaskSettings(("sums",), limit=8, num_fewshot=2, device="cpu")


@pytest.fixture
def lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(stand_in(tmp_path / "site"))
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("PYTHONPATH", f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def models(top: Path, right: dict[str, int]) -> list[Model]:
    found = []
    for arm, count in right.items():
        for seed in (1, 2, 3):
            place = top / f"{arm} {seed}"
            place.mkdir()
            (place / "right.txt").write_text(str(count))
            found.append(Model(arm, seed, str(place)))
    return found


def run(folder: Path, given: list[Model], settings: TaskSettings = SETTINGS) -> tuple[list[Any], list[str]]:
    lines: list[str] = []

    def write_model(adapter: Path, out: Path) -> None:
        out.mkdir()
        (out / "right.txt").write_text((adapter / "right.txt").read_text())

    return benchmark(folder, given, settings, write_model, "full", "rank 8", [1, 2, 3], lines.append), lines


def test_all_models_are_asked_the_same_and_compared(tmp_path: Path, lm_eval: None) -> None:
    given = models(tmp_path, {"full": 6, "rank 8": 6, "rank 1": 2})
    verdicts, lines = run(tmp_path / "study", given)
    assert [each.verdict.verdict for each in verdicts] == ["cannot tell", "behind"]
    assert verdicts[0].sentence.endswith("8 questions; at least 299 are needed for 1 point")
    assert "1 of 9: full, seed 1: sums (acc) 75.0%" in lines
    configs = [yaml.safe_load(file.read_text()) for file in sorted((tmp_path / "study/tasks").glob(f"*/{CONFIG}"))]
    assert len(configs) == 9
    for config in configs:
        del config["model_args"], config["output_path"]
        assert config == configs[0]
    assert (configs[0]["limit"], configs[0]["num_fewshot"], configs[0]["log_samples"]) == (8, 2, True)
    found = read_tasks(tmp_path / "study")
    assert found is not None
    assert [(each["arm"], each["difference"]) for each in found["verdicts"]] == [("rank 8", 0.0), ("rank 1", -0.5)]
    assert len(found["scores"]) == 9


def test_what_is_evaluated_is_not_evaluated_again(tmp_path: Path, lm_eval: None) -> None:
    given = models(tmp_path, {"full": 6, "rank 8": 6})
    run(tmp_path / "study", given)
    logs = sorted((tmp_path / "study/tasks").glob(f"*/{LOG}"))
    for log in logs:
        log.unlink()
    run(tmp_path / "study", given, TaskSettings(("sums",), limit=8, num_fewshot=2, device="cpu", band=0.02))
    assert not any(log.exists() for log in logs), "another band needs no other answers"
    run(tmp_path / "study", given, TaskSettings(("sums",), limit=4, num_fewshot=2, device="cpu"))
    assert all(log.exists() for log in logs)


def test_an_adapter_is_merged_for_its_evaluation_and_not_kept(tmp_path: Path, lm_eval: None) -> None:
    given = models(tmp_path, {"full": 6, "rank 8": 5})
    (Path(given[-1].source) / "adapter_config.json").write_text("{}")
    run(tmp_path / "study", given)
    config = yaml.safe_load((tmp_path / "study/tasks" / given[-1].folder / CONFIG).read_text())
    merged = Path(config["model_args"]["pretrained"])
    assert merged.name == "merged"
    assert not merged.exists()


def test_a_failure_of_lm_eval_is_one_line_with_its_last_words(tmp_path: Path, lm_eval: None) -> None:
    with pytest.raises(DataError, match=r"lm-eval ended with code 1, see .*log.txt: loading the task / Task not found"):
        run_lm_eval(TaskSettings(("boom",), device="cpu"), tmp_path, tmp_path / "out")


@pytest.mark.parametrize("is_allowed", [False, True])
def test_programs_of_models_run_only_where_it_is_allowed(is_allowed: bool, tmp_path: Path, lm_eval: None) -> None:
    (tmp_path / "right.txt").write_text("1")
    settings = TaskSettings(("humaneval",), limit=2, device="cpu", allow_code_execution=is_allowed)
    lines: list[str] = []
    model = Model("full", 1, str(tmp_path))
    benchmark(tmp_path / "run", [model], settings, lambda *_: None, "full", "full", [1], lines.append)
    assert any("without a sandbox" in line for line in lines) is is_allowed
    seen = json.loads((tmp_path / "run/tasks/full-s1/seen.json").read_text())
    assert seen == {CODE: "1" if is_allowed else None, TRUST: None}
    config = config_of(settings, tmp_path, tmp_path)
    assert config.get("confirm_run_unsafe_code", False) is is_allowed
    assert "trust_remote_code" not in str(config)


def test_what_somebody_has_set_before_allows_nothing() -> None:
    given = {CODE: "1", TRUST: "1", "PATH": "/bin"}
    found = environment_of(SETTINGS, given)
    assert CODE not in found
    assert TRUST not in found
    assert found["PATH"] == "/bin"


def test_without_lm_eval_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "lightning-lora\[eval\]"'):
        run(tmp_path / "study", [])
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": ()}, "there are no tasks"),
        ({"limit": 2.5}, "--limit must be a number of questions, or a share below 1"),
        ({"limit": -1}, "--limit"),
        ({"num_fewshot": -1}, "--fewshot must not be negative"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"band": 0.0}, "--band must be a share"),
        ({"band": 1.0}, "--band must be a share"),
        ({"task_folder": "/nowhere/at/all"}, "is no folder"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(settings: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"tasks": ("gsm8k",), **settings}
    with pytest.raises(ConfigError, match=words):
        TaskSettings(**given)


def test_names_of_arms_make_folders_that_any_disk_has() -> None:
    assert Model("full", 3, "x").folder == "full-s3"
    names = ["rank 8, all/../x", "rank 8, all/../y", "漢字", "漢", "..", "rank-8", "rank 8", "x" * 300]
    folders = [Model(name, 1, "x").folder for name in names]
    assert len(set(folders)) == len(names)
    assert all(re.fullmatch(r"[0-9A-Za-z._-]{1,80}", folder) and folder[0] != "." for folder in folders)
    assert Model("untrained base", NO_SEED, "x").title == "untrained base"
