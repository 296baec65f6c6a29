"""Own modules and data, streams, classifiers: what `plan` writes for them is what `fit` then does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lora.allowed_imports import ALLOW_VARIABLE
from lightning_lora.callbacks import PlannedRun
from lightning_lora.cli import main as cli
from lightning_lora.cli.embedded import MODEL, TRAIN
from lightning_lora.cli.lora_cli import LoRACLI
from lightning_lora.trainer_access import found
from tests.support import toys

pytestmark = [
    pytest.mark.slow,
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:rank [0-9]+ is more than"),
    pytest.mark.filterwarnings("ignore:.*parameters outside of lora_root"),
    pytest.mark.filterwarnings("ignore:.*cannot be reached"),
    # jsonargparse cannot write the default of an argument of `LoRAMixin` that was not given.
    pytest.mark.filterwarnings(r"ignore:[\s\S]*Unable to serialize instance"),
]

MINE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from lightning_lora import LoRAConfig, LoRAMixin


class Mine(LightningModule):
    def __init__(self, width: int = 8, classes: int = 3, lr: float = 0.01):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width))
        self.head, self.lr = nn.Linear(width, classes), lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.net(x)), y)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Mixed(LoRAMixin, Mine):
    def __init__(self, width: int = 8, **settings):
        super().__init__(width=width, **settings)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.lora_parameter_groups(self.lr))


class Fixed(Mixed):
    lora = LoRAConfig(rank=3)

    def __init__(self, width: int = 8):
        super().__init__(width=width)


def tensors(rows):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, generator=generator), torch.arange(rows) % 3


class Rows(LightningDataModule):
    def __init__(self, rows: int = 22, batch_size: int = 4):
        super().__init__()
        self.rows, self.batch_size = rows, batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(*tensors(self.rows)), batch_size=self.batch_size, shuffle=True)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from zip(*tensors(64))


class Stream(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=4)


class Texts(LightningDataModule):
    def __init__(self, rows: int = 10, batch_size: int = 2):
        super().__init__()
        self.rows, self.batch_size = rows, batch_size

    def train_dataloader(self):
        words = {"input_ids": torch.arange(6), "attention_mask": torch.ones(6, dtype=torch.long)}
        rows = [words | {"labels": torch.tensor(number % 2)} for number in range(self.rows)]
        return DataLoader(rows, batch_size=self.batch_size)
"""

LORA = {"class_path": "lightning_lora.callbacks.LoRA"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with classes of a user's own."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(ALLOW_VARIABLE, "mine")
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def planned(folder: Path, config: dict[str, Any], *options: str) -> int:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    files = ["--config", "config.yaml", "--write-config", "plan.yaml"]
    return cli.main(["plan", *files, "--no-calibrate", *options])


def fitted() -> PlannedRun:
    quiet = ["enable_progress_bar=false", "logger=false", "enable_model_summary=false", "accelerator=cpu"]
    sys.argv[1:] = ["fit", "--config", "plan.yaml", *(f"--trainer.{each}" for each in quiet)]
    run = found(LoRACLI().trainer, PlannedRun)
    assert run is not None
    return run


def check_exact(run: PlannedRun, *names: str) -> None:
    for name in names:
        assert run.planned[name] == run.measured[name] is not None, name


RUNS: dict[str, dict[str, Any]] = {
    "an own module with the callback": {
        "model": {"class_path": "mine.Mine", "init_args": {"width": 12}},
        "data": {"class_path": "mine.Rows"},
        "trainer": {
            "max_epochs": 2,
            "callbacks": [LORA | {"init_args": {"config": {"targets": ["0"], "trainable": ["head"]}, "root": "net"}}],
        },
    },
    "an own module without LoRA": {
        "model": {"class_path": "mine.Mine"},
        "data": {"class_path": "mine.Rows", "init_args": {"rows": 9}},
    },
    "an own module with the mixin": {
        "model": {"class_path": "mine.Mixed", "init_args": {"lora": {"rank": 2, "init": "pissa"}}},
        "data": {"class_path": "mine.Rows"},
        "trainer": {"max_steps": 5},
    },
    "rows of a step by a callback": {
        "model": {"class_path": "mine.Mixed", "init_args": {"lora": {"rank": 2}}},
        "data": {"class_path": "mine.Rows"},
        "trainer": {
            "callbacks": [{"class_path": "lightning_lora.callbacks.TargetBatchSize", "init_args": {"rows": 8}}]
        },
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_the_yaml_of_an_own_module_trains_as_planned(name: str, folder: Path) -> None:
    assert planned(folder, RUNS[name]) == 0
    check_exact(fitted(), "steps", "tokens", "trained_parameters")


def test_the_yaml_of_a_classifier_trains_as_planned(folder: Path) -> None:
    toys.save_llama(folder / "llama")
    model = {"model": "llama", "num_labels": 2, "lora": {"rank": 2, "init": "gradient", "init_batches": 1}}
    config = {
        "model": {"class_path": "lightning_lora.tasks.SequenceClassifier", "init_args": model},
        "data": {"class_path": "mine.Texts"},
        "trainer": {"max_epochs": 2},
    }
    assert planned(folder, config) == 0
    check_exact(fitted(), "steps", "tokens", "trained_parameters")


def test_a_class_that_sets_its_own_rank_is_told_what_to_write(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model": {"class_path": "mine.Fixed"}, "data": {"class_path": "mine.Rows"}}
    assert planned(folder, config) == 2
    printed = capsys.readouterr()
    assert "Fixed sets its LoRA settings itself" in printed.err
    assert "for this plan write lora = LoRAConfig(rank=" in printed.err
    assert printed.out.startswith("Plan: ")
    assert not (folder / "plan.yaml").exists()


def test_a_stream_needs_a_number_of_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model": {"class_path": "mine.Mine"}, "data": {"class_path": "mine.Stream"}}
    assert planned(folder, config) == 2
    assert "error: nothing tells how long the run is" in capsys.readouterr().err
    assert planned(folder, config | {"trainer": {"max_steps": 3}}) == 0
    assert "cannot tell" in capsys.readouterr().out
    check_exact(fitted(), "steps", "trained_parameters")


@pytest.mark.parametrize("names", [["nowhere/nothing", str(TRAIN)], [str(MODEL), "nowhere/nothing"]])
def test_a_name_that_is_nowhere_is_one_error(
    names: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["plan", *names]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "nowhere/nothing" in errors[0]
    assert not (folder / "plan.json").exists()


def test_an_answer_longer_than_the_context_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toys.save_llama(folder / "llama")
    (folder / "rows.jsonl").write_text('{"question": "What?", "answer": "' + "word " * 80 + '"}\n')
    arguments = ["plan", "llama", "rows.jsonl", "--no-calibrate"]
    with pytest.warns(UserWarning, match="longer than max_length"):
        assert cli.main([*arguments, "--data.init_args.max_length=64"]) == 0
    assert "1 cut (their ends are not learned)" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*arguments, "--data.init_args.max_length=100"]) == 2
    assert "error: " in (error := capsys.readouterr().err)
    assert "64" in error


def test_questions_longer_than_the_context_leave_nothing_to_plan(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toys.save_llama(folder / "llama")
    (folder / "rows.jsonl").write_text('{"question": "' + "what " * 80 + '", "answer": "It."}\n')
    assert cli.main(["plan", "llama", "rows.jsonl", "--data.init_args.max_length=64"]) == 2
    assert "no row has a supervised token" in capsys.readouterr().err
