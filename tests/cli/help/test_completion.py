"""Completion in real shells."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
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


def by_bash(file: Path, typed: str) -> str:
    ask = f"""
source {file}
COMP_WORDS=(lightning-lora {typed}{" ''" if not typed else ""})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_lightning_lora
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    return run(file, "bash", "--norc", "-c", ask)


def by_fish(file: Path, typed: str) -> str:
    return run(file, "fish", "--no-config", "-c", f"source {file}; complete -C 'lightning-lora {typed}'")


def by_zsh(file: Path, typed: str) -> str:
    """Typed into a terminal, as zsh completes nowhere else; control-T lists what could follow."""
    import pty

    (file.parent / ".zshrc").write_text(f"bindkey '^T' list-choices\nsource {file}\nPS1='BEGIN '\n")
    process, terminal = pty.fork()
    if process == 0:
        here = {"TERM": "dumb", "COLUMNS": "300", "ZDOTDIR": str(file.parent)}
        os.execvpe("zsh", ["zsh", "-d", "-i"], os.environ | here)
    read_until(terminal, "BEGIN ")
    os.write(terminal, f"lightning-lora {typed}\x14\x15echo E''ND\r".encode())
    shown = read_until(terminal, "END")
    os.write(terminal, b"exit\r")
    os.waitpid(process, 0)
    os.close(terminal)
    return shown.partition("\n")[2].partition("BEGIN")[0]


def read_until(terminal: int, word: str) -> str:
    shown = ""
    while word not in shown:
        shown += os.read(terminal, 65536).decode()
    return shown


def run(file: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=True, timeout=60)
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize(("shell", "complete"), [("bash", by_bash), ("fish", by_fish), ("zsh", by_zsh)])
def test_a_shell_completes_what_is_typed(
    shell: str, complete: Callable[[Path, str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "completion"
    text = script(shell, capsys)
    assert "trainer.max_epochs" in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script was looked at only")
    file.write_text(text)
    for typed, expected in TYPED.items():
        found = set(complete(file, typed).split())
        assert found >= expected if not typed else found == expected, typed


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main.main(["completion", "tcsh"])
    assert exit.value.code == 2
    assert "bash" in capsys.readouterr().err
