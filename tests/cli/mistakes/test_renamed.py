"""Old names of options: accepted on a command line and in a config, with one message that has the new name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_lora.cli import main as cli
from lightning_lora.cli.mistakes import renamed
from tests.support.commands import EMBEDDED, configs

FIT = ["fit", *configs("sft.yaml", "lora.yaml"), *EMBEDDED]
OLD, NEW = "model.init_args.lora.width", "model.init_args.lora.rank"


@pytest.fixture(autouse=True)
def one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(renamed.RENAMED, OLD, NEW)


def resolved(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    with pytest.raises(SystemExit) as end:
        cli.main([*FIT, *arguments, "--print_config"])
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    return yaml.safe_load(printed.out)["model"]["init_args"]["lora"]


@pytest.mark.parametrize("words", [[f"--{OLD}=5"], [f"--{OLD}", "5"]])
def test_on_the_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match=f"{OLD} is now {NEW}. The old name works in this release and the next one"):
        assert resolved(capsys, *words)["rank"] == 5


def test_in_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.yaml").write_text("model: {init_args: {lora: {width: 5, alpha: 7}}}")
    with pytest.warns(UserWarning, match=f"{OLD} is now {NEW}"):
        found = resolved(capsys, f"--config={tmp_path / 'own.yaml'}")
    assert (found["rank"], found["alpha"]) == (5, 7)


def test_the_new_name_is_told_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolved(capsys, f"--{NEW}=6")["rank"] == 6
