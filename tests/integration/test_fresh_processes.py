"""A fresh process with other random numbers gets the trained module back, or the start of the run said why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaModel

from tests.support import toys, warm
from tests.support.tiny_models import llama_config

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "fresh_process.py"
RETURNS = [
    "Pretrained",
    "NewHead",
    "NewHeadTwice",
    "BatchNorm",
    "SpectralNorm",
    "Observed",
    "MeanTeacher",
    "OtherTeacher",
]
# What no file can hold, to what the start says of it and the error of loading names.
LOST = {
    "Random": (
        "the base looks freshly initialised (net.first, net.next1)",
        "4 of 4 frozen parameters differ: net.first",
    ),
    "RandomHead": ("no checkpoint seems to hold net.next1: ", "2 of 4 frozen parameters differ: net.next1.bias, "),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("fresh")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaModel(llama_config()).save_pretrained(folder / "llama")
    for stage in ("train", "load"):
        warm.run_ranks(1, SCRIPT, stage, folder)
    return {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in ("train", "load")}


@pytest.mark.parametrize("way", ["mixin", "callback"])
@pytest.mark.parametrize("medium", ["ckpt", "folder"])
@pytest.mark.parametrize("name", RETURNS)
def test_a_fresh_process_gets_the_trained_module_back(
    name: str, way: str, medium: str, results: dict[str, Any]
) -> None:
    assert results["load"][f"{name}-{way}-{medium}"] == pytest.approx(0, abs=1e-5)
    assert not [line for line in results["train"][f"{name}-{way}"] if "no checkpoint" in line or "freshly" in line]


@pytest.mark.parametrize("way", ["mixin", "callback"])
@pytest.mark.parametrize("name", LOST)
def test_what_cannot_come_back_is_told_at_the_start_and_named_by_the_error(
    name: str, way: str, results: dict[str, Any]
) -> None:
    at_start, in_error = LOST[name]
    assert any(at_start in line for line in results["train"][f"{name}-{way}"])
    for medium in ("ckpt", "folder"):
        result = results["load"][f"{name}-{way}-{medium}"]
        assert result.startswith("BaseMismatchError: ")
        assert in_error in result


def test_a_new_head_of_a_transformers_model_trains_in_full(results: dict[str, Any]) -> None:
    assert "lora: trained in full: net.score" in results["train"]["NewHead-mixin"]


@pytest.mark.parametrize("name", ["MeanTeacher", "OtherTeacher"])
def test_the_start_says_that_a_teacher_keeps_frozen_adapters(name: str, results: dict[str, Any]) -> None:
    told = "lora: 1 adapters stay frozen, and are saved, in what was frozen before: teacher, unlike net"
    assert told in results["train"][f"{name}-callback"]


TWO_RANKS = """
import sys, torch, torch.distributed
from lightning_lora import LoRAConfig
from lightning_lora.callbacks import LoRA, LoRAGuard
from tests.integration.scripts.fresh_process import MeanTeacher, X, loader, output
from tests.support import toys
module = MeanTeacher()
callbacks = [LoRA(MeanTeacher.settings), LoRAGuard()]
trainer = toys.trainer(sys.argv[2], callbacks=callbacks, max_epochs=2, devices=2, strategy="ddp")
trainer.fit(module, loader())
outputs = trainer.strategy.all_gather(output(module))
assert torch.equal(outputs[0], outputs[1])
assert module.teacher.first.lora_B.any() and not module.teacher.first.lora_B.requires_grad
"""


def test_ddp_accepts_a_teacher_with_frozen_adapters(tmp_path: Path) -> None:
    toys.run_python(TWO_RANKS, "train", tmp_path, ranks=2)


def test_a_run_with_the_callback_says_how_its_checkpoints_are_read(results: dict[str, Any]) -> None:
    lines = results["train"]["BatchNorm-callback"]
    assert any("`class Adapted(LoRAMixin, BatchNorm): lora = LoRAConfig(...)`" in line for line in lines)
    assert results["load"]["subclass"] == pytest.approx(0, abs=1e-5)
