"""A plan on the embedded model and data: its page, its files, and a real run of the YAML that it writes."""

from __future__ import annotations

import json
import shutil
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


@pytest.fixture
def short_names(folder: Path) -> Path:
    """A long path takes lines of the page."""
    for name, target in (("base", MODEL), ("rows.jsonl", TRAIN)):
        (folder / name).symlink_to(target)
    return folder


class Tensors(LightningDataModule):
    """Rows of numbers with targets of the given kind."""

    def __init__(self, targets: torch.Tensor) -> None:
        super().__init__()
        self.rows = TensorDataset(torch.randn(len(targets), 4), targets)
        self.batch_size = 2

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=self.batch_size)


@pytest.mark.slow
def test_the_yaml_trains_as_the_plan_says(short_names: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "base", "rows.jsonl", *SHORT, "--write-config", "plan.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines.index("written: plan.json") <= 40
    plan = json.loads((short_names / "plan.json").read_text())
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


@pytest.mark.slow
def test_a_memory_that_fits_nothing_is_one_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--memory", "1MiB", "--write-config", "plan.yaml"]
    assert cli.main(["plan", shallow(folder), str(TRAIN), *SHORT, *options]) == 2
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


def test_objects_are_planned_and_stay_as_they_are(short_names: Path) -> None:
    data = SFTDataModule(train="rows.jsonl", max_rows=10, max_length=96)
    task = CausalLM("base", lora=ll.LoRAConfig(rank=4))
    plan = ll.plan(task, data, trainer={"max_epochs": 2})
    assert (task.model, data.rows, data.trainer) == (None, {}, None)
    assert plan.data.rows is not None
    assert plan.settings["steps"] == 2 * -(-plan.data.rows // plan.settings["rows_per_step"])
    assert any("step-starved" in reason.why for reason in plan.reasons)
    assert len(str(plan).splitlines()) <= 40
    plan.write_config(short_names / "plan.yaml")


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


def planted(folder: Path, rows: list[tuple[str, str]]) -> str:
    """A file of chats."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return str(file)


def shallow(folder: Path, **settings: int) -> str:
    """The embedded model with two layers and no weights: what takes long in a plan is to trace each layer."""
    model = folder / "shallow"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 2} | settings
    (model / "config.json").write_text(json.dumps(config))
    return str(model)


def test_ten_rows_are_surely_held_and_step_starved(tmp_path: Path) -> None:
    made = ll.plan(shallow(tmp_path), planted(tmp_path, [(f"What is {i}+{i}?", str(2 * i)) for i in range(10)]))
    assert made.method == "lora"
    assert "should be enough" in made.sentence
    assert "step-starved" in str(made)
    assert max(map(len, str(made).splitlines())) <= 80


def test_copies_of_one_row_are_told_and_count_once(tmp_path: Path) -> None:
    made = ll.plan(shallow(tmp_path), planted(tmp_path, [("What is 1+1?", "2")] * 200))
    assert made.data.duplicate_rows == 199
    assert "all 200 rows are the same row" in str(made)
    assert next(row for row in made.capacity if row.rank == 1).verdict == "inside"


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "rows.jsonl"), (json.dumps({"question": "What?", "answer": ""}) + "\n", "'answer' is empty")],
    ids=["empty", "nothing to learn"],
)
def test_data_without_targets_is_one_error(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (folder / "rows.jsonl").write_text(content)
    assert cli.main(["plan", str(MODEL), "rows.jsonl"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


class Built(ll.LoRAMixin, toys.Plain):
    """Makes its layers in ``configure_model``, with an initialiser that draws again until all values are inside."""

    lora = ll.LoRAConfig(rank=2)

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    @override
    def configure_model(self) -> None:
        if self.net is None:
            self.net = toys.Net()
            torch.nn.init.trunc_normal_(self.net.first.weight, std=1.0)


def test_a_module_that_is_built_in_configure_model_is_counted() -> None:
    module = Built()
    made = ll.plan(module, Tensors(torch.randn(64, 2)))
    assert module.net is None
    assert next(row for row in made.capacity if row.rank == 1).parameters == (4 + 8) + (8 + 2)


class Sized(LightningDataModule):
    """Has no loader for training."""


@pytest.mark.parametrize(
    ("module", "data", "settings", "message"),
    [
        (toys.Plain(), Sized(), {}, "has no train_dataloader"),
        (toys.Plain(), [1, 2], {}, "datamodule must be"),
        (3, Sized(), {}, "model must be"),
        (toys.Plain(), Tensors(torch.randn(8, 2)), {"memory": "-3GiB"}, "above zero"),
        (toys.Plain(), Tensors(torch.randn(8, 2)), {"target_batch_size": 8, "devices": 7}, "among 7 devices"),
        (toys.Plain(), Tensors(torch.randn(8, 2)), {"target_batch_size": 0}, "1 or more"),
        (
            toys.Plain(),
            Tensors(torch.randn(8, 2)),
            {"target_batch_size": 4, "trainer": {"accumulate_grad_batches": 2}},
            "give one of the two",
        ),
        (toys.Plain(), Tensors(torch.randn(8, 2)), {"lora": ll.LoRAConfig(targets=["frist"])}, "frist"),
        (
            toys.Plain(),
            Tensors(torch.randn(8, 2)),
            {"lora": ll.LoRAConfig(rank_pattern={"first": 99})},
            r"rank must be in \[1, 4\]",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(module: Any, data: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.LoRAError, match=message):
        ll.plan(module, data, **settings)


def test_a_users_own_callback_is_kept_once(tmp_path: Path) -> None:
    config = {
        "model": {"class_path": "tests.support.toys.Plain"},
        "data": {"class_path": "tests.planning.test_plan.Tensors"},
        "trainer": {"callbacks": [{"class_path": "lightning_lora.callbacks.LoRA", "init_args": {"root": "net"}}]},
    }
    made = ll.plan(toys.Plain(), Tensors(torch.randn(64, 2)), config=config)
    assert made.config is not None
    kinds = [each["class_path"] for each in made.config["trainer"]["callbacks"]]
    assert kinds == ["lightning_lora.callbacks.LoRA", "lightning_lora.callbacks.PlannedRun"]
    assert made.config["trainer"]["callbacks"][0]["init_args"]["root"] == "net"
    assert made.config["trainer"]["callbacks"][0]["init_args"]["config"]["rank"] == made.settings["rank"]


@pytest.mark.slow
def test_a_memory_that_fits_4_bits_only_gets_qlora(tmp_path: Path) -> None:
    heads = {"head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 16}
    model = shallow(tmp_path, hidden_size=1024, intermediate_size=4096, **heads)
    data = planted(tmp_path, [(f"What is {i}+{i}?", str(2 * i)) for i in range(10)])
    roomy = ll.plan(model, data, memory="80GiB")
    assert roomy.method == "lora"
    lora, qlora = roomy.memory["lora"], roomy.memory["qlora"]
    assert lora is not None
    assert qlora is not None
    # The context of CUDA is there with every method.
    room = lora.weights + lora.overhead
    assert qlora.total < room
    tight = ll.plan(model, data, memory=f"{room}B")
    assert (tight.method, tight.fits) == ("qlora", True)
    assert "4 bits only" in " ".join(str(tight).split())


@pytest.mark.slow
def test_measured_bits_take_the_place_of_the_assumption() -> None:
    data = SFTDataModule(train=str(TRAIN), max_rows=10, max_length=96)
    made = ll.plan(CausalLM(str(MODEL), lora=ll.LoRAConfig()), data, measure=True)
    assert made.data.bits == made.data.unique_supervised_tokens
    (row,) = [row for row in made.capacity if row.rank == 1 and row.targets == "all"]
    # An untrained guess among the vocabulary needs more than a bit, and a trained base less than the guess.
    assert row.ratio_a is not None
    assert row.ratio_b is not None
    assert row.ratio_b > row.ratio_a / 2
    assert "measured: the base needs" in str(made)
    assert "(95 %: " in " ".join(str(made).split())
