"""Runs of preferences and rewards are generated from as they were trained, without what was for training only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRAConfig
from lightning_lora.cli.generate.loading import choose_loading, load
from lightning_lora.cli.generate.source import find
from lightning_lora.tasks import DPO
from tests.tasks.rl import pairs, policies

pytestmark = policies.EXPECTED
LORA = LoRAConfig(rank=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["adapted", "in full"])
def test_a_policy_with_a_value_head_writes_as_its_model(
    lora: LoRAConfig | None, dtype: str, llama_folder: Path, tmp_path: Path
) -> None:
    module = policies.make(llama_folder, advantage="gae", lora=lora, learning_rate=0.05)
    runner = policies.fit(module, tmp_path, max_steps=2)
    _assert_same(module, runner, dtype, tmp_path)


def test_a_preference_run_with_a_frozen_reference_writes_as_its_policy(llama_folder: Path, tmp_path: Path) -> None:
    module = DPO(str(llama_folder), 0.05, LORA, reference="frozen")
    _assert_same(module, pairs.fit(module, tmp_path, pairs.loader()), "float32", tmp_path)


def _assert_same(module: Any, runner: Any, dtype: str, folder: Path) -> None:
    runner.save_checkpoint(folder / "as_saved.ckpt")
    checkpoint = torch.load(folder / "as_saved.ckpt", weights_only=True)
    # What a run of the command line records, also where it trains in full.
    checkpoint["hyper_parameters"]["_class_path"] = f"lightning_lora.tasks.{type(module).__name__}"
    torch.save(checkpoint, folder / "x.ckpt")
    loaded = load(find(folder / "x.ckpt"), choose_loading("cpu", dtype, None, False))
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        expected, found = (model.eval().to(getattr(torch, dtype))(ids).logits for model in (module.model, loaded.model))
    assert torch.equal(found, expected)
