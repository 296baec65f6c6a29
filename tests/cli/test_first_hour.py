"""The first hour: from a file with columns of one's own to generated text, each command as the last one printed it."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest

from lightning_lora.cli.embedded import MODEL
from tests.support import warm
from tests.support.commands import COMMAND, configs

pytestmark = pytest.mark.slow

CAPITALS = {"Oslo": "Norwegen", "Rom": "Italien", "Wien": "Österreich", "Bern": "Schweiz", "Kairo": "Ägypten"}
QUESTIONS = ("In welchem Land liegt {}?", "{} ist die Hauptstadt von", "Zu welchem Land gehört {}?", "Wo liegt {}?")


def write_questions(path: Path) -> None:
    """Twenty questions and answers, in columns of the user's own, and one column that nobody asked for."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["frage", "antwort", "quelle"])
        for question in QUESTIONS:
            table.writerows([question.format(city), f"In {land}.", "Atlas"] for city, land in CAPITALS.items())


def run(command: str, folder: Path, code: int = 0) -> str:
    """What a command prints, given as a user pastes it."""
    program, *arguments = shlex.split(command)
    assert program == "lightning-lora"
    done = warm.run(*COMMAND, *arguments, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def test_from_a_file_of_ones_own_to_generated_text(tmp_path: Path) -> None:
    write_questions(tmp_path / "fragen.csv")
    (tmp_path / "base").symlink_to(MODEL)

    preview = "lightning-lora preview fragen.csv --model base"
    refused = run(preview, tmp_path, code=2)
    (columns,) = re.findall(r"--data\.init_args\.columns=\S.*", refused)
    assert columns == """--data.init_args.columns='{"frage": "question", "antwort": "answer"}'"""

    shown = run(f"{preview} {columns}", tmp_path)
    assert "        | In welchem Land liegt Oslo?<|end|>⏎\n" in shown
    assert "trained | In Norwegen.<|end|>\n" in shown
    assert "train: 20 rows, " in shown
    assert "quelle" in shown  # it is not used

    settings = "--model.init_args.model base --data.init_args.train fragen.csv --data.init_args.validation fragen.csv"
    short = "--data.init_args.batch_size 4 --trainer.max_epochs 12 --trainer.check_val_every_n_epoch 6"
    own = f"{settings} {columns} {short} --trainer.val_check_interval 1.0 --trainer.accelerator cpu"
    fitted = run(f"lightning-lora fit {shlex.join(configs('sft.yaml', 'lora.yaml'))} {own}", tmp_path)
    place, losses, *commands = fitted[fitted.index("run in ") :].splitlines()[:5]
    assert place.startswith("run in runs/sft/version_0: adapter adapters/last, last checkpoint checkpoints/")
    assert place.endswith("metrics metrics.csv, loss curve loss.png, report report.html")
    assert re.match(r"best val_loss [\d.]+ at step \d+.* Next:", losses)
    assert all(
        (tmp_path / "runs/sft/version_0" / name).exists() for name in ("adapters/last", "metrics.csv", "loss.png")
    )

    generate, merge, export = (command.strip() for command in commands)
    compared = run(generate, tmp_path)
    assert answers("tuned", compared) == ["In Norwegen.", "In Italien.", "In Österreich."]
    assert not any(answer.startswith("In ") for answer in answers("base", compared))

    run(merge, tmp_path)
    run(export, tmp_path)
    for folder in ("merged", "exported"):
        asked = run(f"lightning-lora generate runs/sft/version_0/{folder} --prompt 'Wo liegt Kairo?'", tmp_path)
        assert answers("answer", asked) == ["In Ägypten."], folder


def answers(whose: str, printed: str) -> list[str]:
    """The answers that ``generate`` prints, each of which ends with the end of a turn."""
    return re.findall(rf"^{whose}  \d+ tokens, end of turn\n(.+)$", printed, flags=re.MULTILINE)
