"""A plan on the embedded model and data: its page, its files, and a real run of the YAML that it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

import lightning_lora as ll
from lightning_lora.cli import main as cli
from lightning_lora.cli.embedded import MODEL, TRAIN
from lightning_lora.cli.lora_cli import LoRACLI
from lightning_lora.data import SFTDataModule
from lightning_lora.tasks import CausalLM
from tests.support import toys

pytestmark = [
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*rows longer than max_length"),
    pytest.mark.filterwarnings("ignore:rank [0-9]+ is more than"),
]

SHORT = ["--data.init_args.max_rows=24", "--data.init_args.max_length=96"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])
    return tmp_path


class Tensors(LightningDataModule):
    """Rows of numbers with targets of the given kind."""

    def __init__(self, targets: torch.Tensor) -> None:
        super().__init__()
        self.rows = TensorDataset(torch.randn(len(targets), 4), targets)
        self.batch_size = 2

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=self.batch_size)


def test_the_yaml_trains_as_the_plan_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(MODEL), str(TRAIN), *SHORT, "--write-config", "plan.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines.index("written: plan.json") <= 40
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["data"]["rows"] + plan["data"]["unsupervised_rows"] == 24
    assert {"lora", "qlora", "full"} == plan["memory"].keys()
    assert all({"value", "why", "source"} == reason.keys() for reason in plan["reasons"])
    sys.argv[1:] = ["fit", "--config", "plan.yaml", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    run = LoRACLI()
    assert run.trainer.global_step == plan["settings"]["steps"]
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    assert trained == plan["parameters"]["trained"]
    callbacks = [type(callback).__name__ for callback in run.trainer.callbacks]  # pyright: ignore[reportAttributeAccessIssue]
    assert "PlannedRun" in callbacks


def test_a_memory_that_fits_nothing_is_one_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--memory", "1MiB", "--write-config", "plan.yaml"]
    assert cli.main(["plan", str(MODEL), str(TRAIN), *SHORT, *options]) == 2
    printed = capsys.readouterr()
    assert "nothing fits into 1 MiB" in printed.err
    assert "The smallest change" in printed.err
    assert not (folder / "plan.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "24", "a", "b"], "has no unit"),
        (["--device", "h10", "a", "b"], "is not in the table"),
        (["--devices", "0", "a", "b"], "devices must be a whole number"),
        ([], "plan needs a model and data"),
        (["only-one"], "is one of the two"),
    ],
)
def test_a_wrong_option_is_one_error(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_objects_are_planned_and_stay_as_they_are(tmp_path: Path) -> None:
    data = SFTDataModule(train=str(TRAIN), max_rows=10, max_length=96)
    task = CausalLM(str(MODEL), lora=ll.LoRAConfig(rank=4))
    plan = ll.plan(task, data, trainer={"max_epochs": 2})
    assert task.model is None
    assert data.rows == {}
    assert data.trainer is None
    assert plan.data.rows is not None
    assert plan.settings["steps"] == 2 * -(-plan.data.rows // plan.settings["rows_per_step"])
    assert any("step-starved" in reason.why for reason in plan.reasons)
    assert len(str(plan).splitlines()) <= 40
    plan.write_config(tmp_path / "plan.yaml")


def test_a_config_that_was_planned_before_is_planned_anew() -> None:
    """Adapters and numbers of the earlier plan are replaced, other callbacks stay."""
    names = "callbacks.LoRA", "callbacks.PlannedRun", "callbacks.BatchSizeMonitor"
    callbacks: list[dict[str, Any]] = [{"class_path": f"lightning_lora.{name}"} for name in names]
    callbacks[0]["init_args"] = {"config": {"rank": 2}, "root": "net"}
    callbacks[1]["init_args"] = {"steps": 7}
    given = {"class_path": "tests.support.toys.Plain"}, {"class_path": "tests.planning.test_plan.Tensors"}
    config = {"model": given[0], "data": given[1], "trainer": {"callbacks": callbacks, "max_epochs": 3}}
    data = Tensors(torch.randn(64, 2))
    made = ll.plan(toys.Plain(), data, lora={"rank": 2}, config=config, trainer=config["trainer"], calibrate=False)
    assert made.config is not None
    written = {
        each["class_path"].rpartition(".")[2]: each.get("init_args") for each in made.config["trainer"]["callbacks"]
    }
    assert list(written) == ["BatchSizeMonitor", "LoRA", "PlannedRun"]
    assert written["LoRA"]["root"] == "net"
    assert written["LoRA"]["config"]["rank"] == made.settings["rank"]
    assert written["PlannedRun"]["steps"] == made.settings["steps"]


def test_regression_cannot_be_told(tmp_path: Path) -> None:
    module = toys.Plain()
    before = toys.snapshot(module)
    plan = ll.plan(module, Tensors(torch.randn(64, 2)))
    assert "cannot tell" in plan.sentence
    assert plan.memory["lora"] is not None
    assert plan.memory["qlora"] is None
    assert toys.same(before, toys.snapshot(module))
    assert max(map(len, str(plan).splitlines())) <= 80
    with pytest.raises(ll.ConfigError, match="no config is written"):
        plan.write_config(tmp_path / "plan.yaml")
