"""The first page of help: short, true, and there at once."""

from __future__ import annotations

import re

import pytest
from jsonargparse import ArgumentParser

from lightning_lora.cli import main
from lightning_lora.cli.help.completion import fit_options
from lightning_lora.cli.help.schema import config_schema
from lightning_lora.cli.help.short_help import OPTIONS, asks_for_short_help, without_all
from lightning_lora.study.batch_probe import BatchProbe
from lightning_lora.study.rank_probe import RankProbe


@pytest.mark.parametrize("command", OPTIONS)
@pytest.mark.parametrize("asked", [["--help"], ["-h"], ["--config", "x.yaml", "--help"]])
def test_the_page_fits_a_terminal(command: str, asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([command, *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 80
    assert f"lightning-lora {command} --help all" in "\n".join(lines)


def test_every_option_exists() -> None:
    known = set(fit_options(config_schema())) | {"--rank", "--ckpt_path"}
    for prefix, kind in (("batch_probe", BatchProbe), ("rank_probe", RankProbe)):
        parser = ArgumentParser()
        parser.add_class_arguments(kind, prefix)
        known |= {f"--{action.dest}" for action in parser._actions}
    named = {
        option
        for options in OPTIONS.values()
        for text in (*options, *options.values())
        for option in re.findall(r"--[\w.]+", text)
    }
    assert len(named) > 15
    assert named <= known


def test_all_shows_every_option_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main.main(["fit", "--help", "all"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--trainer.gradient_clip_val", "--trainer.enable_autolog_hparams", "--target_batch_size", "--data"):
        assert f"  {option} " in printed


def test_what_is_asked_for() -> None:
    assert asks_for_short_help(["fit", "-h"])
    assert not asks_for_short_help(["fit", "--help", "all"])
    assert not asks_for_short_help(["fit", "--model.help", "x"])
    assert without_all(["fit", "--help", "all", "--x"]) == ["fit", "--help", "--x"]
    assert without_all(["fit", "--model", "all"]) == ["fit", "--model", "all"]
