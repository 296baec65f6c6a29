from __future__ import annotations

import sys

import pytest

from lightning_lora.this_command import program, this_command

OURS = "/env/bin/lightning-lora"


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        ([OURS, "fit", "-c", "a b.yaml"], "lightning-lora fit -c 'a b.yaml' --ckpt_path new.ckpt"),
        ([OURS, "fit", "--ckpt_path", "old.ckpt", "-c", "a"], "lightning-lora fit -c a --ckpt_path new.ckpt"),
        ([OURS, "fit", "--ckpt_path=old.ckpt", "-c", "a"], "lightning-lora fit -c a --ckpt_path new.ckpt"),
        (["/lib/lightning_lora/__main__.py", "fit"], "lightning-lora fit --ckpt_path new.ckpt"),
        (["own.py", "fit"], "python own.py fit --ckpt_path new.ckpt"),
    ],
)
def test_a_command_goes_on_from_another_checkpoint(
    typed: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", typed)
    assert this_command("new.ckpt") == command


def test_a_command_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [OURS, "study", "my study.yaml", "--out", "here"])
    assert this_command() == "lightning-lora study 'my study.yaml' --out here"
    assert program() == "lightning-lora"
