"""Two processes write adapters and merged models that one loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_lora import load_adapter, lora_state_dict, merge_lora
from lightning_lora.tasks import CausalLM
from tests import toys
from tests.integration import two_processes
from tests.integration.ports import free_port

pytestmark = [pytest.mark.slow, *toys.expected_warnings]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the llama in it."""
    folder = tmp_path_factory.mktemp("distributed")
    toys.save_llama(folder / "llama")
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_adapter_folders_written_by_two_processes_load_on_one(strategy: str, folder: Path) -> None:
    environment = {
        "PYTHONPATH": str(toys.ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MASTER_PORT": free_port(),
    }
    done = subprocess.run(
        [sys.executable, two_processes.__file__, strategy, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
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
