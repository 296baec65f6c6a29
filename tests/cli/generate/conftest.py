from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora import LoRAConfig, inject_lora, save_adapter
from lightning_lora.cli.embedded import MODEL
from tests.support.tiny_models import wake


@pytest.fixture(scope="package")
def base() -> Any:
    """The embedded model, which has learned to end its turn."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="package")
def tuned() -> Any:
    """The embedded model with adapters that change what it answers."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    inject_lora(model, LoRAConfig(rank=4))
    wake(model, size=0.04)
    return model.eval()


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="package")
def adapter(tuned: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tuned, tmp_path_factory.mktemp("adapter") / "adapter")
