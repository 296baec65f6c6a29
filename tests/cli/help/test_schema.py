"""The JSON schema of configs: it takes what `fit` takes, and marks what `fit` refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from lightning_lora.cli import main
from lightning_lora.cli.help.schema import config_schema
from tests.support.commands import CONFIGS

TASK = "lightning_lora.tasks.CausalLM"


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = config_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("name", sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")))
def test_shipped_configs_are_valid(name: str, validator: Draft202012Validator) -> None:
    assert [error.message for error in validator.iter_errors(yaml.safe_load((CONFIGS / name).read_text()))] == []


def model(**settings: Any) -> dict[str, Any]:
    return {"model": {"class_path": TASK, "init_args": settings}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (model(learning_rte=1e-4), "'learning_rte' was unexpected"),
        (model(learning_rate="fast"), "'fast' is not of type"),
        (model(lora={"rnak": 4}), "is not valid under any of the given schemas"),
        ({"trainer": {"max_stepz": 4}}, "'max_stepz' was unexpected"),
        ({"data": {"class_path": "lightning_lora.data.SFTDataModule", "init_args": {"batch_size": "x"}}}, "'x'"),
        (
            {"trainer": {"callbacks": [{"class_path": "lightning_lora.callbacks.AdapterEMA", "init_args": {"x": 1}}]}},
            "x",
        ),
        ({"target_batch_size": "many"}, "'many'"),
    ],
)
def test_mistakes_are_marked(config: dict[str, Any], words: str, validator: Draft202012Validator) -> None:
    (error,) = validator.iter_errors(config)
    assert words in error.message


def test_classes_of_others_may_hold_anything(validator: Draft202012Validator) -> None:
    config = {"model": {"class_path": "own.Model", "init_args": {"anything": [1]}}, "trainer": {"strategy": "ddp"}}
    assert validator.is_valid(config | {"data": "own.Data"})
    assert validator.is_valid(model(lora={"rank": 4}, model="base"))


@pytest.mark.parametrize("arguments", [["schema"], ["--print_completion", "jsonschema"]])
def test_the_command_prints_or_writes_it(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == config_schema()
    out = tmp_path / "schema.json"
    assert main.main(["schema", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == config_schema()
    assert f"# yaml-language-server: $schema={out}" in capsys.readouterr().out
    assert main.main(["schema", "--out", str(out / "schema.json")]) == 2
