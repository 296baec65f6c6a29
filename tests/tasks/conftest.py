from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import toys


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_llama(tmp_path_factory.mktemp("models") / "llama")
