"""DeepSpeed trains adapters; on CPUs through a subclass of Lightning's strategy, which asks for CUDA."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lightning_lora.callbacks import AdaptiveAccumulation
from lightning_lora.errors import ConfigError
from tests.integration.scripts import deepspeed_runs
from tests.support import toys, warm

pytestmark = [
    pytest.mark.slow,
    *toys.expected_warnings,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of one device, of ZeRO-2 and of ZeRO-3."""
    folder = tmp_path_factory.mktemp("deepspeed")
    toys.save_llama(folder / "llama")
    deepspeed_runs.run(1, folder, 0)
    warm.run_ranks(2, deepspeed_runs.__file__, 2, folder, 2, 3, "target", DS_ACCELERATOR="cpu")
    return folder


def test_zero_2_on_two_processes_equals_one_device(folder: Path) -> None:
    found, expected = torch.load(folder / "2.pt"), torch.load(folder / "0.pt")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert max(tensor.abs().max() for name, tensor in expected.items() if "lora_B" in name) > 1e-3
    assert (folder / "2-adapter" / "adapter_model.safetensors").is_file()


def test_the_engine_accumulates_what_a_target_batch_size_says(folder: Path) -> None:
    found, expected = torch.load(folder / "target.pt"), torch.load(folder / "0.pt")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_accumulation_that_changes_is_refused(tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path, strategy=deepspeed_runs.OnCPU())
    with pytest.raises(ConfigError, match="DeepSpeed accumulates in its engine, where accumulation cannot change"):
        AdaptiveAccumulation({0: 2}).setup(trainer, toys.Toy(), "fit")


def test_a_zero_2_checkpoint_holds_no_frozen_weights(folder: Path) -> None:
    states = torch.load(folder / "2.ckpt" / "checkpoint" / "mp_rank_00_model_states.pt", weights_only=False)
    names = [name for name, _ in states["module"].items()]
    assert any("lora_A" in name for name in names)
    assert not [name for name in names if name.endswith("_proj.weight")]


def test_zero_3_is_refused_before_anything_is_loaded(folder: Path) -> None:
    message = torch.load(folder / "3.pt")
    assert "a pretrained model cannot be loaded under DeepSpeed ZeRO-3: use stage 2, or" in message
    assert "lightning_lora.sharding.FSDP2Strategy" in message
