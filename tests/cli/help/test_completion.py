"""Completion in real shells."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lightning_lora.cli import main
from lightning_lora.cli.commands import COMMANDS

TYPED = {
    "": {"fit", "plan", "study", *COMMANDS},
    "me": {"merge"},
    "export --f": {"--format", "--for"},
    "plan --dev": {"--devices", "--device", "--device-name"},
    "study --o": {"--out"},
    "fit --trainer.max_": {"--trainer.max_epochs", "--trainer.max_steps", "--trainer.max_time"},
    "fit --config x.yaml --model.init_args.lora.rank": {
        "--model.init_args.lora.rank",
        "--model.init_args.lora.rank_pattern",
    },
    "--allow own probe --target_b": {"--target_batch_size"},
}


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_what_is_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "completion.sh").write_text(script("bash", capsys))
    for typed, expected in TYPED.items():
        ask = f"""
source completion.sh
COMP_WORDS=(lightning-lora {typed}{" ''" if not typed else ""})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_lightning_lora
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
        found = set(done.stdout.split())
        assert found >= expected if not typed else found == expected, typed


@pytest.mark.parametrize(("shell", "check"), [("zsh", ["zsh", "-n"]), ("fish", ["fish", "--no-execute"])])
def test_other_shells_get_the_same_names(
    shell: str, check: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(shell, capsys)
    assert "trainer.max_epochs" in text
    assert "model.init_args.lora.rank" in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script was looked at only")
    (tmp_path / "script").write_text(text)
    subprocess.run([*check, tmp_path / "script"], check=True)


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main.main(["completion", "tcsh"])
    assert exit.value.code == 2
    assert "bash" in capsys.readouterr().err
