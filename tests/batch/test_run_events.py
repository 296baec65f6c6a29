"""Events go into the run folder, and a run without one leaves nothing in the working directory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import BatchProbe
from lightning_lora.callbacks import AdaptiveAccumulation
from lightning_lora.files.events import read_events
from tests.study.test_batch_probe_in_a_run import SMALL, Net
from tests.support import toys
from tests.support.monitored import EveryStep

pytestmark = [*toys.expected_warnings, *toys.monitor_warnings]


def fit(**options: Any) -> BatchProbe:
    """A short run in the working directory with every callback that writes events."""
    probe = BatchProbe(at=2, **SMALL)
    callbacks = [EveryStep(), AdaptiveAccumulation({3: 4}), probe]
    quiet: dict[str, Any] = toys.QUIET | {"max_epochs": 1, "enable_checkpointing": False}
    trainer = Trainer(**(quiet | {"accumulate_grad_batches": 2, "callbacks": callbacks} | options))
    trainer.fit(Net(), toys.loader(32, 2), toys.loader(16, 2, seed=2))
    return probe


def test_a_run_without_a_folder_writes_nothing_and_says_so_once_for_each_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        probe = fit()
    assert probe.result is not None
    assert list(tmp_path.iterdir()) == []
    for writer in ("BatchSizeMonitor", "AdaptiveAccumulation", "BatchProbe"):
        assert caplog.text.count(f"{writer} writes no events.jsonl: the run has no logger and no default_root") == 1


@pytest.mark.parametrize("folder", [".", "run"])
def test_a_default_root_dir_that_was_given_is_the_run_folder(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(default_root_dir=folder)
    assert {file.name for file in Path(folder).iterdir()} == {
        "batch_probe.json",
        "batch_probe.png",
        "batch_size.png",
        "events.jsonl",
    }
    assert {event["event"] for event in read_events(Path(folder))} == {
        "batch",
        "noise_scale",
        "accumulation",
        "batch_probe",
    }


def test_the_folder_of_the_logger_is_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(logger=CSVLogger(tmp_path / "logs", "", ""))
    assert {file.name for file in tmp_path.iterdir()} == {"logs"}
    assert {"batch_probe.json", "batch_probe.png", "batch_size.png", "events.jsonl"} < {
        file.name for file in (tmp_path / "logs").iterdir()
    }
