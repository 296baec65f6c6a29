from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_lora.lora.layers import registry
from lightning_lora.lora.targets import roles
from tests.support import toys


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: workers share what is left, and at the end that should be short tests."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(roles, "_REGISTERED", dict(roles._REGISTERED))
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with its tokenizer on disk."""
    return toys.save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A strategy of several processes that a test makes tells later ones, and their children, that they are one of
    them, and where its processes meet."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
