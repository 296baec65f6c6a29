"""``target_batch_size`` in YAML and on the command line: the rows of a step, and nothing else to reckon."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import yaml

from lightning_lora.cli import main as cli
from tests.support.commands import EMBEDDED, configs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])


def test_a_target_in_yaml_sets_accumulation(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "target.yaml").write_text("target_batch_size: 8\n")
    with caplog.at_level(logging.INFO):
        assert cli.main(["fit", *configs("sft.yaml", "lora.yaml"), "--config=target.yaml", *EMBEDDED]) == 0
    # 12 rows in batches of 4.
    assert "effective batch 8 = 4 rows x 2 accumulated x 1 device" in caplog.text
    assert "epoch 0, step 2  loss" in capfd.readouterr().out
    (saved,) = (tmp_path / "runs" / "sft").glob("*/config.yaml")
    assert yaml.safe_load(saved.read_text())["target_batch_size"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target_batch_size=10"], "is not a multiple of 4 rows x 1 device: the nearest multiples are 8 and 12"),
        (["--target_batch_size=0"], "must be a whole number of 1 or more, got 0"),
        (
            ["--target_batch_size=8", "--trainer.callbacks+=lightning_lora.callbacks.TargetBatchSize"],
            "target_batch_size and a TargetBatchSize callback are the same: give one of the two",
        ),
    ],
)
def test_a_target_that_cannot_be_ends_with_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", *configs("sft.yaml", "lora.yaml"), *EMBEDDED, *arguments]) == 2
    assert message in capfd.readouterr().err
