"""Every example that help shows is run as it stands, in the order in which a user would, in one folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_lora.cli.commands import COMMANDS
from lightning_lora.cli.embedded import MODEL, TRAIN, VALIDATION
from lightning_lora.cli.help.short_help import EXAMPLES
from lightning_lora.cli.plan.command import EXAMPLE as PLAN
from lightning_lora.cli.study.command import EXAMPLE as STUDY
from tests.support import warm
from tests.support.commands import COMMAND

EXAMPLE = {name: command.example for name, command in COMMANDS.items()} | EXAMPLES
EXAMPLE |= {"plan": PLAN.removeprefix("example: "), "study": STUDY.removeprefix("example: ")}
ORDER = (
    *("env", "completion", "recipes", "schema", "preview", "plan", "fit", "validate", "inspect", "report", "generate"),
    *("merge", "export"),
)
LEFT_OUT = {
    "demo": "takes a minute; tests/cli/test_demo.py runs it",
    "evaluate": "needs lm-eval; tests/cli/study/test_evaluate.py runs it where it is installed",
    "probe": "takes 100 steps and more; tests/cli/test_probe.py runs it",
    "predict": "needs a data module with rows to predict; tests/cli/test_configs.py runs it",
    "test": "as validate; tests/cli/test_configs.py runs it",
    "study": "takes minutes; tests/cli/study/test_study_command.py runs a small one",
    "consolidate": "needs shards of several processes; tests/integration/test_checkpoint_ranks.py runs it",
}


def test_no_example_is_forgotten() -> None:
    assert {*ORDER, *LEFT_OUT} == EXAMPLE.keys()
    for reason in LEFT_OUT.values():
        for word in reason.split():
            assert not word.startswith("tests/") or Path(__file__).parents[3].joinpath(word).exists(), word


@pytest.mark.slow
def test_examples_do_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(MODEL)
    rows = TRAIN.read_text().splitlines(keepends=True)[:12]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    for name in ORDER:
        words = shlex.split(EXAMPLE[name])
        assert words[:2] == ["lightning-lora", name]
        done = warm.run(*COMMAND, *words[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{EXAMPLE[name]}\n{done.stdout}\n{done.stderr}"
        if name == "recipes":
            small(tmp_path)
    assert json.loads((tmp_path / "lightning-lora.schema.json").read_text())["properties"]["trainer"]
    assert (tmp_path / "merged/model.safetensors").is_file()
    assert (tmp_path / "exported/adapter_model.safetensors").is_file()
    assert (tmp_path / "plan.json").is_file()


def small(folder: Path) -> None:
    """Edit the copied config as a user does: the embedded model and few rows."""
    file = folder / "cli_configs/sft.yaml"
    config = yaml.safe_load(file.read_text())
    config["model"]["init_args"]["model"] = "models/base"
    config["data"]["init_args"] |= {"train": "rows.jsonl", "validation": str(VALIDATION), "validation_rows": 4}
    config["data"]["init_args"] |= {"batch_size": 4, "max_length": 128}
    config["trainer"] |= {"val_check_interval": 1.0, "accelerator": "cpu"}
    file.write_text(yaml.safe_dump(config))
