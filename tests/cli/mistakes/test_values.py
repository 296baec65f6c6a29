"""Values that YAML may read otherwise than people do: exact, or refused by name; and files that are hardly YAML."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.cli import main as cli
from lightning_lora.cli.mistakes.config_files import check_config_files
from lightning_lora.errors import ConfigError
from lightning_lora.files.yaml_text import read_yaml
from tests.support.commands import EMBEDDED, configs
from tests.support.toys import tree

FIT = ["fit", *configs("sft.yaml", "lora.yaml"), *EMBEDDED]
RATE, LORA = "model:\n  init_args:\n    learning_rate: ", "model:\n  init_args:\n    lora:\n      "
REFUSED = {
    "B62 a key twice": ("trainer:\n  devices: 1\n  devices: 2\n", "'devices' is given twice"),
    "B64 no for a number": (RATE + "no\n", "learning_rate (own.yaml, line 3) must be a number"),
    "B64 off for a pattern": (LORA + "targets: [off]\n", "targets holds False"),
    "B64 octal": (LORA + "rank: 010\n", "own.yaml: line 4: 010 is octal to YAML"),
    "B64 sixties": ("trainer:\n  max_steps: 1:30\n", "own.yaml: line 2: 1:30 counts in sixties"),
    "B64 a date for a number": (RATE + "2026-01-01\n", "must be a number"),
    "B65 a list as name": ("? [a]\n: b\n", "line 1: the name of a setting must be a text, not a list"),
    "B65 nested brackets": ("trainer: " + "[" * 5000 + "\n", "own.yaml: it is nested too deeply"),
    "B65 two documents": ("trainer: {}\n---\ntrainer: {}\n", "found another document"),
    "B66 a large file": ("# " + "x" * 5 * 2**20, "bytes: settings need a few thousand"),
    "B66 an unknown tag": ("trainer:\n  devices: !one 1\n", "line 2 has the tag"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_otherwise_than_it_looks_is_refused(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = REFUSED[name]
    (folder / "own.yaml").write_text(content)
    before = tree(folder)
    try:
        code: Any = cli.main([*FIT, "--config=own.yaml"])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert tree(folder) == before


@pytest.mark.parametrize("number", ["1e-4", "1.e-4", "'1e-4'", "0.0001", "1E-4", "+1e-4"])
def test_b63_every_spelling_of_a_rate_is_the_same_number(
    number: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own.yaml").write_text(RATE + number + "\n")
    with pytest.raises(SystemExit) as exit:
        cli.main([*FIT, "--config=own.yaml", "--print_config"])
    assert exit.value.code == 0
    assert read_yaml(capsys.readouterr().out)["model"]["init_args"]["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("trainer:\n  max_steps: 1_0\n", "max_steps", 10),
        ("trainer:\n  max_epochs: 0x10\n", "max_epochs", 16),
        ("trainer:\n  default_root_dir: 2026-01-01\n", "default_root_dir", "2026-01-01"),
        ("trainer:\n  default_root_dir: '010'\n", "default_root_dir", "010"),
        ("\ufefftrainer:\r\n  max_steps: 3\r\n", "max_steps", 3),
    ],
    ids=["B64 1_0", "B64 hexadecimal", "B64 a date for a text", "B64 a number for a text", "B65 mark and CRLF"],
)
def test_what_is_plain_is_exact(
    text: str, key: str, value: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own.yaml").write_bytes(text.encode())
    with pytest.raises(SystemExit) as exit:
        cli.main([*FIT, "--config=own.yaml", "--print_config"])
    assert exit.value.code == 0
    assert read_yaml(capsys.readouterr().out)["trainer"][key] == value


PLACES = {
    "B70 a name of 300 characters": "n" * 300,
    "B70 a file": "file",
    "B70 below a file": "file/out",
    "B70 a folder with files": "full",
    "B70 inside of the source": "adapter/../full",
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_cannot_be_written_is_one_line(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_lora import LoRAConfig, inject_lora, save_adapter
    from tests.support import toys

    module = toys.Net()
    inject_lora(module, LoRAConfig(rank=2))
    save_adapter(module, folder / "adapter")
    (folder / "file").write_text("in the way")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    before = tree(folder)
    assert cli.main(["export", "adapter", PLACES[name]]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert tree(folder) == before


def test_b70_blanks_and_letters_of_any_alphabet_are_a_place(folder: Path) -> None:
    from lightning_lora import LoRAConfig, inject_lora, load_adapter, save_adapter
    from tests.support import toys

    module = toys.Net()
    inject_lora(module, LoRAConfig(rank=2))
    place = save_adapter(module, folder / "ein Ördner" / "数据 'x'")
    assert cli.main(["export", str(place), "o ut"]) == 0
    other = toys.Net()
    other.load_state_dict(toys.base_of(module))
    load_adapter(other, "o ut")


def test_a_config_that_cannot_be_read_is_named(folder: Path) -> None:
    """B69; a test may run as a user who may read everything, so the file is no text."""
    (folder / "own.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"own\.yaml cannot be read as text"):
        check_config_files(["--config=own.yaml"])
