"""Two processes write adapters and merged models that one loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_lora import load_adapter, lora_state_dict, merge_lora
from lightning_lora.tasks import CausalLM
from tests.integration.scripts import two_processes
from tests.support import toys, warm

pytestmark = [pytest.mark.slow, *toys.expected_warnings]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the llama in it."""
    folder = tmp_path_factory.mktemp("distributed")
    toys.save_llama(folder / "llama")
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_adapter_folders_written_by_two_processes_load_on_one(strategy: str, folder: Path) -> None:
    warm.run_ranks(2, two_processes.__file__, strategy, folder)
    out = folder / strategy
    module = CausalLM(str(folder / "llama"))
    module.configure_model()
    load_adapter(module, out / "adapters" / "last")
    assert toys.same(lora_state_dict(module), torch.load(out / "final.pt", weights_only=True))
    assert (out / "adapters" / "best" / "adapter_model.safetensors").is_file()
    if strategy == "ddp":
        merge_lora(module)
        merged = CausalLM(str(out / "merged"))
        merged.configure_model()
        assert toys.same(toys.base_of(module), toys.snapshot(merged))
