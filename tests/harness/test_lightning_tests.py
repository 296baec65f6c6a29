"""The comparison finds what differs with us and is not listed, and what is listed and does not differ."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.harness import lightning_tests
from tests.harness.lightning_tests import RECORD, compare, main, read_expected, run_tests
from tests.harness.outcomes import DIED, read_outcomes
from tests.support import warm

TESTS = """
import os
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from tests_pytorch.helpers.models import Shared

@pytest.mark.flaky(reruns=3)
def test_trains(tmp_path):
    Trainer(max_steps=1, logger=False, default_root_dir=tmp_path, accelerator="cpu").fit(BoringModel())

@pytest.mark.parametrize("name", ["checkpoints", "model.ckpt"])
def test_files(name, tmp_path):
    trainer = Trainer(max_steps=1, logger=False, default_root_dir=tmp_path, accelerator="cpu")
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert len([file for file in os.listdir(tmp_path) if file.startswith(name)]) == 1

def test_shared(tmp_path):
    model = Shared()
    Trainer(max_steps=1, logger=False, default_root_dir=tmp_path, accelerator="cpu").fit(model)
    assert model.layer.weight.requires_grad

def test_lacking():
    import nothing_at_all

@pytest.mark.skip
def test_skipped(): ...

@pytest.mark.xfail(strict=True)
def test_known(): raise ValueError
"""
MODELS = """
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
import torch

class Shared(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 2)
    training_step = BoringModel.training_step
    step, loss, forward = BoringModel.step, BoringModel.loss, BoringModel.forward
    configure_optimizers, train_dataloader = BoringModel.configure_optimizers, BoringModel.train_dataloader
"""
FILE = "tests_pytorch/test_some.py"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project with the shape of Lightning's."""
    folder = tmp_path_factory.mktemp("checkout")
    helpers = folder / "tests/tests_pytorch/helpers"
    helpers.mkdir(parents=True)
    for package in (helpers, helpers.parent):
        (package / "__init__.py").touch()
    (helpers / "models.py").write_text(MODELS)
    (folder / "tests" / FILE).write_text(TESTS)
    (helpers.parent / "test_dies.py").write_text("import os\ndef test_dies(): os._exit(3)\ndef test_after(): ...\n")
    (helpers.parent / "test_broken.py").write_text("import nothing_at_all\n")
    return folder


def run_warm(command: list[str], cwd: Path, env: dict[str, str], stdout: Any, **streams: Any) -> None:
    """`subprocess.run` for a Python that has imported Lightning already."""
    warm.Process(*command[1:], cwd=cwd, env=env, stdout=Path(stdout.name)).wait()


@pytest.mark.slow
def test_what_differs_is_listed_or_reported(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = [f"{FILE}::test_files", f"{FILE}::test_trains", "tests_pytorch/test_not_selected.py::test_any"]
    (tmp_path / "expected.yaml").write_text(yaml.safe_dump([{"reason": "a manifest beside", "tests": listed}]))
    monkeypatch.setattr(lightning_tests, "EXPECTED", tmp_path / "expected.yaml")
    monkeypatch.setattr(lightning_tests, "subprocess", SimpleNamespace(run=run_warm))
    assert main([str(checkout), "--select", "test_some.py", "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert f"fails with us only: {FILE}::test_shared\n" in printed
    assert f"listed in expected.yaml, but passes: {FILE}::test_trains\n" in printed
    assert "test_not_selected" not in printed
    # Passes both times: test_trains and one of test_files; does not pass as it is: lacking, skipped, known.
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("all")]
    assert row == ["all", "2", "1", "1", "3"]
    # A second run takes the outcomes that are there.
    (tmp_path / "expected.yaml").write_text(
        yaml.safe_dump([{"reason": "r", "tests": [f"{FILE}::test_files[model.ckpt]", f"{FILE}::test_shared"]}])
    )
    assert main([str(checkout), "--select", "test_some.py", "--out", str(tmp_path / "out")]) == 0


def test_a_test_at_which_the_process_dies_does_not_hide_the_others(checkout: Path, tmp_path: Path) -> None:
    outcomes = tmp_path / "outcomes.jsonl"
    select = ["tests_pytorch/test_dies.py", "tests_pytorch/test_broken.py"]
    run_tests(checkout / "tests", select, outcomes, [RECORD], timeout=60)
    assert read_outcomes(outcomes) == {
        "tests_pytorch/test_dies.py::test_dies": DIED,
        "tests_pytorch/test_dies.py::test_after": "passed",
        "tests_pytorch/test_broken.py": "failed",
    }


def test_only_what_passes_as_it_is_counts() -> None:
    plain = {"a": "passed", "b": "failed", "c[1]": "passed", "c[2]": "passed", "d": "passed", "e": "passed"}
    ours = {"a": "passed", "b": "failed", "c[1]": "failed", "c[2]": "passed", "d": "skipped"}
    found = compare(plain, ours, ["c", "a", "b", "elsewhere"])
    kinds = {"a": "same", "b": "plain", "c[1]": "expected", "c[2]": "same", "d": "fault", "e": "fault"}
    assert found.kinds == kinds
    assert found.faults == ["d", "e"]
    assert found.stale == ["a"]


def test_a_folder_that_is_no_checkout_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path} has no folder tests/tests_pytorch" in capsys.readouterr().err


def test_every_expected_difference_has_a_reason_and_stands_once() -> None:
    entries = yaml.safe_load(lightning_tests.EXPECTED.read_text())
    tests = [test for entry in entries for test in entry["tests"]]
    assert len(tests) == len(set(tests)) == len(read_expected())
    assert all(len(entry["reason"]) > 20 and entry["tests"] for entry in entries)
    assert all(test.startswith("tests_pytorch/") and "::" in test for test in tests)
