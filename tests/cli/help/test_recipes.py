"""The configs that come with the package."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lightning_lora.cli import main
from lightning_lora.cli.help import recipes as module
from tests.support.commands import CONFIGS
from tests.support.toys import tree


def test_the_list_names_every_config_and_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(lines[::2]) == {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.is_file()}
    assert lines[lines.index("full.yaml") + 1].startswith("    Full fine-tuning, the baseline LoRA is compared with")
    assert all(line.startswith("    ") and len(line) > 20 for line in lines[1::2])


def test_copies_are_equal_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["recipes", "copy", "sft.yaml", "strategy/ddp.yaml"]) == 0
    written = tree(tmp_path / "cli_configs")
    assert written == {name: tree(CONFIGS)[name] for name in ("sft.yaml", "strategy/ddp.yaml")}
    (tmp_path / "cli_configs/sft.yaml").write_text("mine: 1\n")
    before = tree(tmp_path)
    assert main.main(["recipes", "copy"]) == 2
    assert "cli_configs/sft.yaml is there already" in capsys.readouterr().err
    assert tree(tmp_path) == before
    assert main.main(["recipes", "copy", "--to", "all"]) == 0
    assert tree(tmp_path / "all") == tree(CONFIGS)


def test_a_wrong_name_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main.main(["recipes", "copy", "sftt.yaml", "--to", str(tmp_path / "x")]) == 2
    assert "there is no recipe 'sftt.yaml'; did you mean 'sft.yaml'" in capsys.readouterr().err
    assert main.main(["recipes", "list", "sft.yaml"]) == 2
    assert "recipes copy NAME" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_installed_package_has_them_in_its_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "lightning_lora"
    shutil.copytree(CONFIGS, package / "assets" / "cli_configs")
    monkeypatch.setattr(module, "_PACKAGE", package)
    assert module.recipes_folder() == package / "assets" / "cli_configs"
    assert len(module.recipes()) == len(tree(CONFIGS))
