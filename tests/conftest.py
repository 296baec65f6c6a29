from __future__ import annotations

import pytest
import torch

from lightning_lora import roles
from lightning_lora.layers import registry


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(roles, "_REGISTERED", dict(roles._REGISTERED))
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
