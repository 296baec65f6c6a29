"""A reference that is a frozen copy stays what it was, whatever happens to the adapter of the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import LoRAConfig, lora_layers
from lightning_lora.callbacks import RankGrowth
from lightning_lora.tasks import DPO
from tests.support import tiny_models, toys
from tests.tasks.rl import pairs
from tests.tasks.rl.test_dpo import by_hand

pytestmark = toys.expected_warnings


def make(folder: str, **lora: Any) -> DPO:
    """A policy whose adapter has learned something before, as has a norm that is trained in full."""
    module = DPO(folder, 1e-2, LoRAConfig(rank=2, trainable=["norm"], **lora), beta=0.5)
    module.configure_model()
    tiny_models.wake(module, size=0.3)
    return module


def growth(**options: Any) -> RankGrowth:
    return RankGrowth(**({"max_rank": 4, "budget": 100_000, "every_n_steps": 1, "threshold": 0.001} | options))


@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"scaling": "rslora"}, {"init": "pissa"}], ids=str)
def test_a_reference_does_not_grow_with_its_policy(lora: dict[str, Any], tmp_path: Path) -> None:
    folder = pairs.folder_of_llama(tmp_path)
    module, batch = make(folder, **lora), next(iter(pairs.loader()))
    with torch.no_grad():
        reference = by_hand(module.model, batch)
    runner = pairs.fit(module, tmp_path, pairs.loader(), callbacks=[growth()])
    _assert_compares(module, batch, reference)
    runner.save_checkpoint(tmp_path / "grown.ckpt")
    resumed = make(folder, **lora)
    pairs.fit(resumed, tmp_path, pairs.loader(), max_epochs=2, callbacks=[growth()], ckpt_path=tmp_path / "grown.ckpt")
    _assert_compares(resumed, batch, reference)


def _assert_compares(module: DPO, batch: dict[str, Tensor], reference: Tensor) -> None:
    assert module.reference.kind == "frozen"
    assert {layer.lora_spec.rank for layer in lora_layers(module).values()} == {4}
    before = toys.snapshot(module)
    with torch.no_grad():
        policy = by_hand(module.model, batch)
        rewards = module.score(batch).rewards
    assert (policy - reference).abs().max() > 0.01
    torch.testing.assert_close(rewards, 0.5 * (policy - reference), rtol=1e-4, atol=1e-4)
    assert toys.same(before, toys.snapshot(module))
