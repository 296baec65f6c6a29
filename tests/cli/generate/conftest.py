from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora import LoRAConfig, inject_lora, save_adapter
from lightning_lora.cli.embedded import MODEL
from tests.cli.generate import runs
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


@pytest.fixture(scope="package")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of two steps at a rate at which answers change."""
    return runs.fit(tmp_path_factory.mktemp("lora"), "lora.yaml", "--model.init_args.learning_rate=0.003")


@pytest.fixture(scope="package")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of full fine-tuning of two steps."""
    return runs.fit(tmp_path_factory.mktemp("full"), "full.yaml", "--model.init_args.learning_rate=0.003")
