"""Places that a careless user names: of the wrong kind, empty, full, or somebody else's."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_lora import LoRAConfig, inject_lora, save_adapter
from lightning_lora.cli import main as cli
from lightning_lora.cli.embedded import MODEL, TRAIN
from lightning_lora.cli.mistakes.writing import full_disk
from lightning_lora.errors import CommandError
from lightning_lora.files import safetensors_file
from lightning_lora.tasks.loading import load_model
from tests.support.tiny_models import wake
from tests.support.toys import tree


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model(AutoModelForCausalLM, str(MODEL), new_head=False, dtype=torch.float32)
    inject_lora(model, LoRAConfig(rank=2))
    wake(model)
    return save_adapter(model, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path) -> Path:
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "file").write_text("as it was")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])
    return tmp_path


def run(*words: object) -> Any:
    try:
        return cli.main([*map(str, words)])
    except SystemExit as exit:
        return exit.code


def edit(name: str, content: str) -> Callable[[], object]:
    return lambda: Path(name).write_text(content)


REFUSED: dict[str, tuple[Callable[[], object], tuple[object, ...], str]] = {
    "empty out": (lambda: None, ("merge", MODEL, "adapter", ""), "argument out: the name is empty"),
    "empty run": (lambda: None, ("inspect", " "), "argument path: the name is empty"),
    "a link to itself": (lambda: Path("o").symlink_to("o"), ("merge", MODEL, "adapter", "o"), "symbolic links"),
    "a merged model on a model": (
        lambda: None,
        ("export", "adapter", "model", "--format=merged"),
        "model is not empty and holds no merge_certificate.json",
    ),
    "a tokenizer that cannot be read": (
        edit("adapter/tokenizer_config.json", "{}"),
        ("export", "adapter", "o"),
        "tokenizer 'adapter' cannot be loaded",
    ),
    "stops that cannot be read": (
        edit("adapter/generation_config.json", "{"),
        ("export", "adapter", "o"),
        "adapter/generation_config.json is not readable JSON",
    ),
    "a seed below 0": (lambda: None, ("demo", "--seed=-1"), "seed must be a whole number of 0 or more"),
    "a seed beyond 32 bits": (lambda: None, ("demo", f"--seed={2**32}"), "seed must be below 2**32"),
    "a plan in a folder": (lambda: None, ("plan", MODEL, TRAIN, "--json=model"), "model is a folder: name a file"),
    "a plan on its data": (
        lambda: None,
        ("plan", MODEL, "file", "--json=./file"),
        "file is read by this plan, and would be replaced",
    ),
    "devices without number": (
        lambda: None,
        ("plan", MODEL, TRAIN, "--memory=24GiB", f"--devices={10**20}"),
        "devices must be at most 100,000",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_a_place_that_cannot_serve_is_one_line_and_all_stays(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words, message = REFUSED[name]
    make()
    before = tree(folder)
    assert run(*words) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("error: ") == 1
    assert tree(folder) == before


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_full_disk_is_one_line_and_what_was_there_stays(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ("merge", MODEL, "adapter", "o") if command == "merge" else ("export", "adapter", "o", "--format=merged")
    assert run(*first) == 0
    before, written = tree(folder), safetensors_file._raw_bytes

    def full(name: str, *rest: Any) -> Any:
        if name.startswith("model.layers.3"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(name, *rest)

    monkeypatch.setattr(safetensors_file, "_raw_bytes", full)
    assert run(*first) == 2
    assert "o cannot be written: the disk is full" in capsys.readouterr().err
    assert tree(folder) == before
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run(*first) == 0
    assert tree(folder) == before


@pytest.mark.parametrize("error", [OSError(errno.EDQUOT, "quota"), ValueError("I/O error: (os error 28)")])
def test_every_way_to_say_that_a_disk_is_full_is_known(error: Exception) -> None:
    with pytest.raises(CommandError, match=r"out cannot be written: the disk is full"), full_disk("out"):
        raise error


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(PermissionError), full_disk("out"):
        raise PermissionError(errno.EACCES, "no")


@pytest.mark.filterwarnings("ignore")
def test_the_home_folder_is_meant_where_a_shell_leaves_its_sign(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert run("merge", MODEL, "~/adapter", "~/merged") == 0
    assert (folder / "merged" / "model.safetensors").is_file()
    assert not (folder / "~").exists()


def test_events_that_are_none_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "events.jsonl").write_text("[1]\n")
    assert run("report", folder) == 2
    assert "events.jsonl is damaged: ValueError: line 1 holds no event" in capsys.readouterr().err
