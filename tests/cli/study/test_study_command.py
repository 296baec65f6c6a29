from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lora.cli.embedded import MODEL, TRAIN, VALIDATION
from lightning_lora.study.matched.record import StudyRecord, read_study
from lightning_lora.study.matched.store import Store
from tests.cli.study import forking
from tests.support import commands, toys, warm

BASE = {
    "model": {
        "class_path": "lightning_lora.tasks.CausalLM",
        "init_args": {"model": str(MODEL), "learning_rate": 3e-4},
    },
    "data": {
        "class_path": "lightning_lora.data.SFTDataModule",
        "init_args": {
            "train": str(TRAIN),
            "validation": str(VALIDATION),
            **{"max_rows": 8, "validation_rows": 4, "batch_size": 4, "max_length": 256},
        },
    },
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "gradient_clip_val": 1.0},
}
ARMS: dict[str, Any] = {
    "full": {"learning_rates": [3.3e-4, 6.6e-4, 2e-3]},
    "rank 8": {"overrides": {"model.init_args.lora": {"rank": 8}}, "learning_rates": [1.1e-4, 3.3e-4, 1e-3]},
}


def write(folder: Path, **settings: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    file = folder / "ranks.yaml"
    file.write_text(yaml.safe_dump({"configs": ["base.yaml"], "arms": ARMS, "seeds": 1} | settings, sort_keys=False))
    return file


def both(**overrides: Any) -> dict[str, Any]:
    return {"full": None, "other": {"overrides": overrides}}


MISTAKES = {
    "unknown option": (both(**{"model.init_args.lora.rnak": 8}), "arm 'other': ", "did you mean 'rank'"),
    "unknown option of the trainer": (both(**{"trainer.maximum_epochs": 8}), "arm 'other': ", "maximum_epochs"),
    "learning rate": (
        both(**{"model.init_args.learning_rate": 1}),
        "which the study sets for each run",
        "learning_rates",
    ),
    "seed": (both(seed_everything=1), "which the study sets for each run, alike in all arms", ""),
    "other data": (both(**{"data.init_args.max_rows": 6}), "differ in data", "set it for the whole study"),
    "other precision": (both(**{"trainer.precision": "bf16-true"}), "differ in precision", "must be equal"),
    "target": (
        both(**{"model.init_args.lora": {"targets": ["q_prj"]}}),
        "arm 'other': target 'q_prj' matches none",
        "",
    ),
    "rank of a pattern": (
        both(**{"model.init_args.lora": {"rank_pattern": {"q_prj": 2}}}),
        "arm 'other': rank_pattern 'q_prj' matches none",
        "",
    ),
    "matched rank": (
        {
            "full": {"overrides": {"model.init_args.lora": {"rank": 4096}}},
            "other": {"overrides": {"model.init_args.lora": {"targets": ["q_proj"]}}, "matched_rank": "full"},
        },
        "arm 'other', matched_rank 'full': targets=('q_proj',) hold",
        "match at a lower rank",
    ),
    "precision of the base": (
        both(**{"model.init_args.dtype": "bfloat16"}),
        "differ in precision of the base (model.init_args.dtype: None and 'bfloat16')",
        "",
    ),
    "validation rows": (both(**{"trainer.limit_val_batches": 1}), "differ in share of the validation rows", ""),
    "batches of an epoch": (
        both(**{"trainer.limit_train_batches": 2, "data.init_args.batch_size": 2}),
        "train on all and 4 rows by limit_train_batches and batch size",
        "change trainer.limit_train_batches with the batch",
    ),
    "the same": (both(), "'full' and 'other' are the same", ""),
    "no config": ({"full": None, "other": {"configs": ["no.yaml"]}}, "no.yaml' does not exist", ""),
}


@pytest.mark.parametrize(("arms", "first", "second"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_in_an_arm_is_one_error_and_nothing_is_written(
    tmp_path: Path, arms: dict[str, Any], first: str, second: str
) -> None:
    file = write(tmp_path, arms=arms)
    done = commands.lightning_lora("study", str(file), "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert first in lines[0]
    assert second in lines[0]
    assert not (tmp_path / "out").exists()


OWN = {"model.class_path": "tests.study.matched.learner.Learner", "data.class_path": "tests.study.matched.learner.Rows"}


def own_study(folder: Path, **settings: Any) -> Path:
    """A study of a module and data of the user's own."""
    base = {
        "model": {"class_path": OWN["model.class_path"], "init_args": {"learning_rate": 1e-3}},
        "data": {"class_path": OWN["data.class_path"]},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(base))
    arms = {"full": None, "rank 2": {"overrides": {"model.init_args.lora": {"rank": 2}}}}
    file = folder / "own_study.yaml"
    file.write_text(yaml.safe_dump({"configs": ["own.yaml"], "arms": arms, "seeds": 1} | settings, sort_keys=False))
    return file


OWN_MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "target": (
        {"arms": {"full": None, "last": {"overrides": {"model.init_args.lora": {"targets": ["lyer"]}}}}},
        (),
        "arm 'last': target 'lyer' matches none",
    ),
    "kept models": ({}, ("--keep-models",), "--keep-models: arm 'full' trains Learner in full"),
    "option of the rate": (
        {"learning_rate_option": "model.init_args.lr"},
        (),
        "arm 'full' has no option model.init_args.lr",
    ),
}


@pytest.mark.parametrize(("settings", "options", "message"), OWN_MISTAKES.values(), ids=list(OWN_MISTAKES))
def test_what_the_own_module_of_an_arm_cannot_do_is_said_before_anything_is_trained(
    tmp_path: Path, settings: dict[str, Any], options: tuple[str, ...], message: str
) -> None:
    file = own_study(tmp_path, **settings)
    done = commands.lightning_lora("--allow", "tests", "study", str(file), "--out", "out", *options, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_what_is_no_study_is_one_error(tmp_path: Path) -> None:
    cases = {
        (): "study needs a study file",
        ("no.yaml",): "no.yaml cannot be read",
        (str(write(tmp_path)), "--trainer.max_steps=3"): "options of fit go under overrides",
        (str(write(tmp_path)), "--hours", "-1"): "--hours must be a positive number",
        (str(write(tmp_path)), "--hours", "2"): "--hours shortens the runs of a study without a file",
        (str(write(tmp_path)), "--storage", "mysql://host/s"): "must be sqlite:///FILE or postgresql://",
    }
    for arguments, message in cases.items():
        done = commands.lightning_lora("study", *arguments, cwd=tmp_path)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, warm.Done, StudyRecord]:
    folder = tmp_path_factory.mktemp("study")
    stops = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "nothing"}}
    broken = {"overrides": {"trainer.callbacks": [stops]}, "learning_rates": [1e-4]}
    file = write(folder, arms=ARMS | {"broken": broken}, primary="rank 8", evaluations="log", aa=True)
    done = warm.run(forking.__file__, "study", file, "--out", folder / "out", cwd=folder)
    return folder, done, read_study(folder / "out")


@pytest.mark.slow
def test_a_study_trains_its_arms_by_the_code_of_fit(finished: tuple[Path, warm.Done, StudyRecord]) -> None:
    _, done, record = finished
    assert done.returncode == 3, done.stderr
    for arm, trained in (("full", 1_878_240), ("rank 8", 122_240)):
        runs = record.cells_of(arm)
        assert {cell.state for cell in runs} == {"done"}
        assert {cell.trained_parameters for cell in runs} == {trained}
        assert {cell.steps for cell in runs} == {2}
        assert all((record.run_folder(cell) / "config.yaml").is_file() for cell in runs)
    (adapted,) = record.cells_of("rank 8", "verdict")
    assert (
        record.run_folder(adapted) / "adapters/last/adapter_model.safetensors"
    ).stat().st_size == adapted.saved_bytes
    losses = record.row_losses(adapted)
    assert losses is not None
    mean = float(losses.loss_sum.sum() / losses.tokens.sum())
    assert [(point.step, point.val_loss) for point in record.curve(adapted) if point.val_loss is not None][1:] == [
        (2, pytest.approx(mean, rel=1e-6))
    ]
    assert set(losses.tokens.tolist()) != {1}
    config = yaml.safe_load((record.run_folder(adapted) / "config.yaml").read_text())
    assert config["seed_everything"] == config["data"]["init_args"]["seed"] == adapted.seed == 1
    assert config["model"]["init_args"]["learning_rate"] == adapted.learning_rate


@pytest.mark.slow
def test_every_file_of_a_study_is_on_the_page_of_files(finished: tuple[Path, warm.Done, StudyRecord]) -> None:
    folder, _, record = finished
    assert record.cells
    assert commands.unlisted_files(folder / "out") == set()


@pytest.mark.slow
def test_a_failed_arm_is_rows_with_a_reason_and_exit_code_3(finished: tuple[Path, warm.Done, StudyRecord]) -> None:
    _, done, record = finished
    (failed,) = record.cells_of("broken")
    assert failed.state == "failed"
    assert failed.reason.startswith("RuntimeError: Early stopping conditioned on metric `nothing`")
    assert failed.attempt == 2
    verdicts = {verdict["arm"]: verdict for verdict in record.verdicts}
    assert verdicts["rank 8"]["sentence"] == "cannot tell: 1 seed; at least 3 are needed"
    assert "every run failed" in verdicts["broken"]["sentence"]
    assert "no verdict: it takes at least 3 seeds" in done.stdout
    assert "noise floor: full runs with 1 other seeds too" in done.stdout
    assert "noise floor: full with other seeds against full: cannot tell: 1 seed" in done.stdout
    assert f"{len(record.cells)} of about" in done.stdout


@pytest.mark.slow
def test_a_second_start_runs_nothing_and_another_study_is_refused(
    finished: tuple[Path, warm.Done, StudyRecord],
) -> None:
    folder, _, record = finished
    before = toys.tree(folder / "out" / "runs")
    again = warm.run(forking.__file__, "study", "ranks.yaml", "--out", "out", cwd=folder)
    assert again.returncode == 3
    assert f"{len(record.cells)} runs are over already" in again.stdout
    assert toys.tree(folder / "out" / "runs") == before
    assert [vars(cell) for cell in read_study(folder / "out").cells] == [vars(cell) for cell in record.cells]
    other = folder / "other"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("out"))
    write(other, band=0.1)
    refused = warm.run(forking.__file__, "study", "ranks.yaml", "--out", folder / "out", cwd=other)
    assert refused.returncode == 2
    assert "holds another study 'ranks'" in refused.stderr
    assert json.loads((folder / "out" / "verdicts.json").read_text())


@pytest.mark.slow
def test_a_run_ends_with_its_worker_and_another_worker_does_it(tmp_path: Path) -> None:
    file = write(tmp_path, overrides={"data.init_args.max_rows": 64})
    worker = warm.Process(forking.__file__, "study", file, "--out", "out", cwd=tmp_path)
    until = time.monotonic() + 120
    while not (locks := list((tmp_path / "out" / "runs").glob(".full*.lock"))):
        assert worker.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    run = int(json.loads(locks[0].read_text())["pid"])
    assert run != worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    until = time.monotonic() + 20
    while Path(f"/proc/{run}/stat").is_file() and " Z " not in Path(f"/proc/{run}/stat").read_text():
        assert time.monotonic() < until, "the run goes on without its worker"
        time.sleep(0.05)
    (interrupted,) = [cell for cell in read_study(tmp_path / "out").cells if cell.state == "running"] or [None]
    store = Store(f"sqlite:///{tmp_path / 'out' / 'study.sqlite'}", "ranks")
    claim = store.claim()
    assert claim is not None
    assert claim.attempt == 2, "a dead process of this machine is not waited for"
    assert interrupted is None or claim.cell.key == interrupted.key
