"""What a newcomer gets wrong: one line that says what, where and what to do, exit code 2, and nothing is written."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

from lightning_lora import LoRAConfig, inject_lora, save_adapter
from lightning_lora.cli import main as cli
from lightning_lora.cli.embedded import MODEL
from lightning_lora.cli.mistakes.config_files import check_config_files
from lightning_lora.cli.mistakes.options import nearest
from tests.support import toys
from tests.support.commands import EMBEDDED, configs
from tests.support.toys import tree

FIT = ["fit", *configs("sft.yaml", "lora.yaml"), *EMBEDDED]
TRACEBACK = "Traceback (most recent call last):\n  File \"x.py\", line 1\nModuleNotFoundError: No module named 'x'\n"

# Content of own.yaml, which goes on top of the shipped configs, and words of the answer.
CONFIGS = {
    "indented too far": (
        "model:\n  init_args:\n   model: x\n    learning_rate: 1\n",
        ["own.yaml, line 4, 'learning_rate: 1'", "Is the line indented"],
    ),
    "indented too little": (
        "model:\n  init_args:\n  learning_rate: 1\n",
        ["own.yaml, line 3: 'learning_rate' beside init_args", "two more columns"],
    ),
    "beside class_path": (
        "data:\n  class_path: lightning_lora.data.SFTDataModule\n  train: rows.csv\n",
        ["own.yaml, line 3: 'train' beside class_path"],
    ),
    "a tab": ("model:\n\tinit_args: {}\n", ["own.yaml, line 2", "a tab"]),
    "a group twice": (
        "trainer:\n  max_steps: 1\ntrainer:\n  devices: 1\n",
        ["'trainer' is given twice", "lines 1 and 3"],
    ),
    "two colons": ("model: init_args: x\n", ["own.yaml, line 1, 'model: init_args: x'"]),
    "a list": ("- model\n", ["own.yaml holds a list, not settings"]),
    "a csv": ("frage,antwort\nWas?,Das.\n", ["own.yaml holds the text 'frage,antwort", "not settings"]),
    "empty": ("", ["own.yaml is empty"]),
    "a traceback": (TRACEBACK, ["own.yaml, line 1: a traceback of Python", "No module named 'x'"]),
    "no text": ("\0\1\2", ["own.yaml is not YAML"]),
    "group misspelled": (
        "modle:\n  init_args:\n    learning_rate: 1\n",
        ["'modle.init_args.learning_rate' (own.yaml, line 3)", "did you mean 'model.init_args.learning_rate'"],
    ),
    "lora setting": ("model:\n  init_args:\n    lora:\n      rnk: 4\n", ["no setting 'rnk'; did you mean 'rank'"]),
    "data setting": (
        "data:\n  init_args:\n    btach_size: 4\n",
        ["Option 'btach_size' is not accepted (own.yaml, line 3)", "did you mean 'batch_size'"],
    ),
    "number in quotes": (
        "model:\n  init_args:\n    learning_rate: '1e-4x'\n",
        ["model.init_args.learning_rate (own.yaml, line 3) must be a number, such as", "got '1e-4x'"],
    ),
    "class misspelled": (
        "model:\n  class_path: lightning_lora.tasks.CasualLM\n",
        ["there is no class lightning_lora.tasks.CasualLM", "did you mean 'CausalLM'"],
    ),
    "callback misspelled": (
        "trainer:\n  callbacks:\n    - class_path: lightning_lora.callbacks.BatchMonitor\n",
        ["trainer.callbacks: ", "did you mean 'BatchSizeMonitor'"],
    ),
    "callback without its module": (
        "trainer:\n  callbacks: AdapterCheckpont\n",
        ["no class path; did you mean lightning_lora.callbacks.AdapterCheckpoint"],
    ),
    "setting of a callback": (
        "trainer:\n  callbacks:\n    - class_path: lightning_lora.callbacks.AdapterCheckpoint\n"
        "      init_args:\n        montor: val_loss\n",
        ["Option 'montor' is not accepted", "did you mean 'monitor'"],
    ),
}
ARGUMENTS = {
    "B71 nothing ends the run": (
        [*FIT, "--trainer.max_epochs=null"],
        ["neither trainer.max_steps nor trainer.max_epochs is set", "give one of the two"],
    ),
    "B71 shards of one process": (
        [*FIT, *configs("strategy/fsdp2.yaml"), "--trainer.devices=1"],
        ["trainer.strategy FSDP2Strategy", "trainer.devices='1'", "leave trainer.strategy out"],
    ),
    "no model": (["fit"], ["there is no model: give --config FILE"]),
    "config does not exist": (["fit", "--config=cli_config/sft.yaml"], ["'cli_config/sft.yaml' does not exist"]),
    "config misspelled": (["fit", "--config", "rows.yml"], ["'rows.yml' does not exist", "did you mean 'row.yml'"]),
    "config is weights": (
        ["fit", f"--config={MODEL / 'model.safetensors'}"],
        ["model.safetensors cannot be read as text"],
    ),
    "learning rate is a word": (
        [*FIT, "--model.init_args.learning_rate=fast"],
        ["model.init_args.learning_rate (on the command line) must be a number", "got 'fast'"],
    ),
    "steps are a word": (
        [*FIT, "--trainer.max_steps=many"],
        ["trainer.max_steps (on the command line) must be a whole"],
    ),
    "half a row": (
        [*FIT, "--data.init_args.batch_size=2.5"],
        ["batch_size (on the command line) must be a whole number"],
    ),
    "columns are a word": ([*FIT, "--data.init_args.columns=frage"], ["must be names with values", "got 'frage'"]),
    "precision": ([*FIT, "--trainer.precision=bf17"], ["got 'bf17'; did you mean 'bf16'"]),
    "lora without its group": ([*FIT, "--lora.rnk=4"], ["'lora.rnk'", "did you mean 'model.init_args.lora.rank'"]),
    "rate without its group": ([*FIT, "--learning_rate=1"], ["did you mean 'model.init_args.learning_rate'"]),
    "setting of a policy": ([*FIT, "--group_sise=4"], ["did you mean 'model.init_args.group_size'"]),
    "setting of prompts": ([*FIT, "--max_promt_length=4"], ["did you mean 'data.init_args.max_prompt_length'"]),
    "data without its group": ([*FIT, "--train=rows.csv"], ["did you mean 'data.init_args.train'"]),
    "lora to be printed": (
        [*FIT, "--model.init_args.lora.rnak=4", "--print_config"],
        ["lora has no setting 'rnak'; did you mean 'rank'"],
    ),
    "a rank to be printed": ([*FIT, "--model.init_args.lora.rank=0", "--print_config"], ["rank must be at least 1"]),
    "step memory to be printed": (
        [*FIT, '--model.init_args.step_memory={"gaet":"keep"}', "--print_config"],
        ["step_memory has no setting 'gaet'; did you mean 'gate'"],
    ),
    "no dashes": ([*FIT, "rows.csv"], ["'rows.csv' is no option: options begin with --"]),
    "class misspelled": (
        [*FIT, "--data=lightning_lora.dta.SFTDataModule"],
        ["lightning_lora has no 'dta'; did you mean 'data'"],
    ),
    "strategy misspelled": ([*FIT, "--trainer.strategy=dpp"], ["invalid strategy name", "did you mean 'ddp'"]),
    "accelerator": (
        [*FIT, "--trainer.accelerator=gpuu"],
        ["error: trainer: ", "accelerator='gpuu'", "Available names"],
    ),
    "devices are a word": ([*FIT, "--trainer.devices=x"], ["trainer: `devices` selected with"]),
    "no data": (["fit", *configs("sft.yaml", "lora.yaml"), EMBEDDED[0], "--data=null"], ["there is no data"]),
    "model is a file": ([*FIT, "--model.init_args.model=rows.csv"], ["'rows.csv' is a file; give the folder"]),
    "folder is a file": ([*FIT, "--trainer.default_root_dir=rows.csv"], ["cannot write in rows.csv", "another folder"]),
    "own columns": (
        [*FIT, "--data.init_args.train=rows.csv"],
        ["rows.csv, row 0 (line 2)", "'frage', 'antwort'", "columns"],
    ),
    "preview without a model": (["preview", "rows.csv"], ["preview of rows.csv needs a tokenizer: add --model FOLDER"]),
    "preview of nothing": (["preview", "nope.csv", f"--model={MODEL}"], ["'nope.csv' does not exist"]),
    "inspect a csv": (["inspect", "rows.csv"], ["rows.csv is not a checkpoint", "does not begin like a checkpoint"]),
    "inspect a model": (["inspect", str(MODEL)], ["is a model, not a run: it holds no checkpoint"]),
    "inspect nothing": (["inspect", "nope"], ["there is no nope: give a run folder"]),
    "merge the wrong way round": (
        ["merge", "adapter", str(MODEL), "out"],
        ["adapter is an adapter and", "merge BASE ADAPTER OUT"],
    ),
    "merge without a folder": (["merge", "a"], ["required: adapter, out. example: lightning-lora merge"]),
    "option misspelled": (["inspect", "adapter", "--verfy"], ["--verfy; did you mean '--verify'"]),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rows.csv").write_text("frage,antwort,quelle\nWas?,Das.,x\n")
    (tmp_path / "row.yml").write_text("trainer: {}\n")
    module = toys.Net()
    inject_lora(module, LoRAConfig(rank=2))
    save_adapter(module, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])
    return tmp_path


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints, which must be one line with an error and end with code 2."""
    capsys.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr().err
    assert code == 2, printed
    assert "Traceback (" not in printed
    # Kinds of bad rows follow in indented lines.
    lines = [line for line in printed.splitlines() if not line.startswith(("Seed", "GPU", "TPU", "tip: ", "  "))]
    assert len(lines) == 1, printed
    assert lines[0].startswith("error: ")
    return printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_mistake_in_arguments_is_one_line(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = ARGUMENTS[name]
    before = tree(folder)
    line = answer(arguments, capsys)
    assert [part for part in words if part not in line] == [], line
    assert tree(folder) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_mistake_in_a_config_is_one_line(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, words = CONFIGS[name]
    (folder / "own.yaml").write_text(content)
    before = tree(folder)
    line = answer([*FIT, "--config=own.yaml"], capsys)
    assert [part for part in words if part not in line] == [], line
    assert tree(folder) == before


def test_a_config_of_the_package_that_is_not_here_is_told_how_to_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--config=cli_configs/sft.yaml", "--config=cli_configs/strategy/ddp.yaml"]
    with pytest.raises(SystemExit) as end:
        cli.main(fit)
    assert end.value.code == 2
    asked = "lightning-lora recipes copy sft.yaml strategy/ddp.yaml"
    assert asked in " ".join(capsys.readouterr().err.split())
    assert cli.main(asked.split()[1:]) == 0
    assert (tmp_path / "cli_configs/strategy/ddp.yaml").is_file()
    check_config_files(fit)


def test_the_nearest_option_may_lack_its_groups() -> None:
    options = ["trainer.max_steps", "model.init_args.warmup_steps", "data.init_args.max_rows", "seed_everything"]
    assert nearest("max_steps", options) == "; did you mean 'trainer.max_steps'?"
    assert nearest("trainer.max_step", options) == "; did you mean 'trainer.max_steps'?"
    assert nearest("colour", options) == "."


def test_callbacks_that_another_config_replaces_are_told(tmp_path: Path) -> None:
    for name, key in (("first.yaml", "callbacks"), ("second.yaml", "callbacks"), ("more.yaml", "callbacks+")):
        (tmp_path / name).write_text(f"trainer:\n  {key}:\n    - class_path: lightning_lora.callbacks.PlannedRun\n")
    first, second, more = (str(tmp_path / name) for name in ("first.yaml", "second.yaml", "more.yaml"))
    with pytest.warns(UserWarning, match=r"of .*second\.yaml replace those of .*first\.yaml.*write 'callbacks\+:'"):
        check_config_files(["--config", first, "--config", second])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_config_files(["--config", first, "--config", more])
