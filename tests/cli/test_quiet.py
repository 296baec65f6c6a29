"""What the libraries below us say while a run goes well: nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import warm

SCRIPT = """
import logging, os, sys

from lightning_lora.cli import LoRACLI
from transformers import PreTrainedModel  # imports torchao, bitsandbytes and peft

from lightning_lora.cli.embedded import MODEL, TRAIN, VALIDATION
from lightning_lora.data import SFTDataModule
from lightning_lora.tasks import CausalLM

class Own(CausalLM):
    pass

os.chdir(sys.argv[1])
logging.getLogger("torchao").warning("a warning of torchao")
settings = {"learning_rate": 1e-4, "lora.rank": 2, "model": MODEL}
data = {"train": TRAIN, "validation": VALIDATION, "max_rows": 4, "validation_rows": 2, "batch_size": 2}
arguments = [f"--model.{name}={value}" for name, value in settings.items()]
arguments += [f"--data.{name}={value}" for name, value in data.items()]
LoRACLI(Own, SFTDataModule, args=["fit", *arguments, "--trainer.max_steps=1", "--trainer.accelerator=cpu"])
"""
NOISE = ("Failed to load", "Enum subclass", "kernels-community", "💡", "LeafSpec", "it/s", "\r")


@pytest.mark.slow
def test_a_script_of_the_user_hears_what_concerns_it_and_no_noise(tmp_path: Path) -> None:
    done = warm.run_cold("-c", SCRIPT, tmp_path)
    for words in NOISE:
        assert words not in done.stdout + done.stderr
    assert "a warning of torchao" in done.stderr
    assert "learning rate 0.0001 x 10 = 0.001 for 35 adapters" in done.stderr
    assert "Set a lower value for log_every_n_steps" in done.stderr
