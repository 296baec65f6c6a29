from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora import save_adapter
from tests.support.adapter_files import adapted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter folder of the tiny Llama."""
    return save_adapter(adapted(), tmp_path / "adapter")
