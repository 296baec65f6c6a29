"""The command line from outside: what it prints, what it writes, what it answers to bad input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_lora import load_adapter
from lightning_lora.cli import main as cli
from lightning_lora.cli.commands import COMMANDS
from lightning_lora.cli.embedded import MODEL
from lightning_lora.files.checkpoint_manifest import SUFFIX
from tests.support.commands import EMBEDDED, assert_same_logits, configs, lightning_lora
from tests.support.toys import tree


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short LoRA run from the shipped configs, made by the command."""
    where = tmp_path_factory.mktemp("run")
    done = lightning_lora(
        "fit", *configs("sft.yaml", "lora.yaml"), *EMBEDDED, "--trainer.val_check_interval=3", cwd=where
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (where / "runs" / "sft").iterdir()
    (folder / "stdout.txt").write_text(done.stdout + done.stderr)
    return folder


def test_fit_leaves_config_metrics_checkpoint_and_adapter(run_folder: Path) -> None:
    assert {"config.yaml", "metrics.csv", "checkpoints", "adapters"} <= {entry.name for entry in run_folder.iterdir()}
    assert json.loads((run_folder / "adapters/last/lightning_lora.json").read_text())["summary"]["step"] == 3


def test_fit_prints_layers_rate_and_progress_without_control_characters(run_folder: Path) -> None:
    printed = (run_folder / "stdout.txt").read_text()
    assert "35 layers adapted (20 attention, 15 mlp), rank 32" in printed
    assert "learning rate 0.0003 x 10 = 0.003 for 35 adapters" in printed
    assert "tokens/s" in printed
    assert "val_loss" in printed
    assert "\x1b" not in printed
    assert "💡" not in printed


@pytest.mark.parametrize("path", ["adapters/last", ""])
def test_inspect_shows_roles_and_verifies_hashes(
    path: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run, ignore=shutil.ignore_patterns("*.ckpt"))  # of a run folder the latest is taken
    assert cli.main(["inspect", str(run / path), "--verify"]) == 0
    printed = capsys.readouterr().out
    for words in ("adapter folder", "attention", "mlp", "every layer has an update", "verified"):
        assert words in printed


def test_inspect_shows_and_verifies_a_checkpoint(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = (run_folder / "checkpoints").glob("*.ckpt")
    assert cli.main(["inspect", str(checkpoint), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "Lightning checkpoint" in printed
    assert "verified: every file has the size and SHA-256 of" in printed


def damaged_copy(run_folder: Path, folder: Path) -> Path:
    (checkpoint,) = (run_folder / "checkpoints").glob("*.ckpt")
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    shutil.copy(f"{checkpoint}{SUFFIX}", folder / f"bad.ckpt{SUFFIX}")
    (folder / "bad.ckpt").write_bytes(content)
    return folder / "bad.ckpt"


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_damaged_checkpoint_is_bad_input(
    command: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = damaged_copy(run_folder, tmp_path)
    assert cli.main([command, str(bad), *([str(tmp_path / "out")] if command == "export" else [])]) == 2
    assert "bad.ckpt is damaged: its SHA-256 is" in capsys.readouterr().err


@pytest.mark.slow
def test_fit_goes_on_from_the_last_whole_checkpoint_and_validate_refuses(run_folder: Path, tmp_path: Path) -> None:
    bad = damaged_copy(run_folder, tmp_path)
    arguments = [*configs("sft.yaml", "lora.yaml"), *EMBEDDED, f"--ckpt_path={bad}"]
    alone = lightning_lora("fit", *arguments, "--trainer.max_epochs=2", cwd=tmp_path)
    assert alone.returncode == 2
    assert "bad.ckpt is damaged" in alone.stderr
    assert "holds no whole checkpoint that could stand for it" in alone.stderr
    (good,) = (run_folder / "checkpoints").glob("*.ckpt")
    for suffix in ("", SUFFIX):
        shutil.copy(f"{good}{suffix}", tmp_path / f"good.ckpt{suffix}")
    refused = lightning_lora("validate", *arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert "The last whole checkpoint beside it is" in refused.stderr
    resumed = lightning_lora("fit", *arguments, "--trainer.max_epochs=2", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "good.ckpt" in resumed.stdout + resumed.stderr


def test_merge_gives_the_logits_of_the_adapter(run_folder: Path, tmp_path: Path) -> None:
    adapter, out = run_folder / "adapters/last", tmp_path / "merged"
    before = tree(MODEL)
    assert cli.main(["merge", str(MODEL), str(adapter), str(out), "--dtype", "float32"]) == 0
    assert tree(MODEL) == before
    tokens = torch.arange(64).reshape(2, 32)
    adapted = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    load_adapter(adapted, adapter)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert_same_logits(merged(tokens).logits, adapted(tokens).logits)


@pytest.mark.parametrize("source", ["", "checkpoints", "adapters/last"])
def test_export_writes_the_same_adapter_from_run_checkpoint_and_folder(
    run_folder: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next((run_folder / source).glob("*.ckpt")) if source == "checkpoints" else run_folder / source
    assert cli.main(["export", str(path), str(tmp_path / "out"), "--for", "vllm"]) == 0
    assert "--enable-lora --max-lora-rank 32" in capsys.readouterr().out
    written = tree(tmp_path / "out")
    assert written["adapter_model.safetensors"] == tree(run_folder / "adapters/last")["adapter_model.safetensors"]
    assert "tokenizer.json" in written


def test_export_merged_loads_in_transformers(run_folder: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(run_folder), str(tmp_path / "out"), "--format", "merged"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    adapted = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    load_adapter(adapted, run_folder / "adapters/last")
    tokens = torch.arange(64).reshape(2, 32)
    assert_same_logits(merged(tokens).logits, adapted(tokens).logits)


BAD_INPUT = {
    "no command": ([], "usage"),
    "unknown command": (["fti"], "did you mean 'fit'"),
    "B01 rank 0": (["--model.init_args.lora.rank=0"], "rank must be at least 1, got 0"),
    "B02 rank 1.5": (["--model.init_args.lora.rank=1.5"], "rank must be an integer"),
    "B04 alpha 0": (["--model.init_args.lora.alpha=0"], "alpha must be greater than 0"),
    "B05 dropout": (["--model.init_args.lora.dropout=1.5"], "dropout must be in [0, 1)"),
    "B06 learning rate": (
        ["--model.init_args.learning_rate=0"],
        "learning_rate must be a finite number greater than 0",
    ),
    "B07 no target": (['--model.init_args.lora.targets=["q_prj"]'], "did you mean 'q_proj'"),
    "B20 tied head": (["--model.init_args.lora.adapt_head=true"], "shares its weight with 'model.embed_tokens'"),
    "B61 lora setting": (["--model.init_args.lora.rnak=4"], "no setting 'rnak'; did you mean 'rank'"),
    "B61 model option": (["--model.init_args.learning_rte=1"], "did you mean 'learning_rate'"),
    "B61 trainer option": (["--trainer.max_stepz=1"], "did you mean 'trainer.max_steps'"),
    "B67 os.system": (["--model=os.system"], "Importing 'os.system' is not allowed"),
    "B68 no LightningModule": (["--model=torch.nn.Linear"], "not correspond to a subclass of LightningModule"),
    "B69 missing config": (["--config=nope.yaml"], "does not exist"),
    "B69 config is a folder": (["--config=."], "is not a file"),
    "B69 config is a URL": (["--config=https://example.org/x.yaml"], "does not exist"),
    "model folder missing": (["--model.init_args.model=./nope"], "'./nope' is not a folder"),
    "data file missing": (["--data.init_args.train=nope.jsonl"], "'nope.jsonl' does not exist"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_exits_with_2_says_what_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = BAD_INPUT[name]
    if arguments and arguments[0].startswith("--"):
        arguments = ["fit", *configs("sft.yaml", "lora.yaml"), *EMBEDDED, *arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    assert code == 2
    assert words in printed.out + printed.err
    assert tree(tmp_path) == {}


def test_a_typo_in_a_config_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "overlay.yaml").write_text("trainer:\n  max_stepz: 3\n")
    done = lightning_lora("fit", *configs("sft.yaml"), "--config=overlay.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "max_stepz" in done.stderr
    assert "did you mean 'trainer.max_steps'" in done.stderr


def test_own_classes_need_to_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from lightning.pytorch.demos.boring_classes import BoringModel as Own\n")
    refused = lightning_lora("fit", "--model=own.Own", "--trainer.fast_dev_run=true", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--allow PREFIX" in refused.stderr
    allowed = lightning_lora(
        "--allow",
        "own",
        "fit",
        "--model=own.Own",
        "--trainer.fast_dev_run=true",
        "--trainer.accelerator=cpu",
        cwd=tmp_path,
    )
    assert allowed.returncode == 0, allowed.stderr


@pytest.mark.parametrize("command", ["plan", "study", *COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    assert f"example: lightning-lora {command}" in " ".join(capsys.readouterr().out.split())
