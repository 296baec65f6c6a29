"""The wide llama, and chunks of the head that are shorter than the batches of a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora.memory import candidates, run_step
from tests.support import toys


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_llama(tmp_path_factory.mktemp("wide") / "llama", num_hidden_layers=3, intermediate_size=96)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of a test have fewer rows than the chunks of a run."""
    monkeypatch.setattr(candidates, "HEAD_ROWS", (64, 32, 8))
    monkeypatch.setattr(run_step, "SECONDS", 600.0)
