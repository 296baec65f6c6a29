"""What is logged of pairs in training: weighted means, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRAConfig
from lightning_lora.tasks import DPO, RewardModel
from lightning_lora.tasks.rl.pair_means import weights_of
from tests.support import tiny_models, toys
from tests.tasks.rl import pairs

pytestmark = [*toys.expected_warnings, pytest.mark.filterwarnings("ignore:Some weights of .* were not initialized")]


@pytest.mark.parametrize("weights", [[2.0, 1.0, 0.5, 0.0], [0.0] * 4, None], ids=str)
@pytest.mark.parametrize("task", [DPO, RewardModel])
def test_means_of_training_are_weighted(task: Any, weights: list[float] | None, tmp_path: Path) -> None:
    module = task(pairs.folder_of_llama(tmp_path), learning_rate=1e-3, lora=LoRAConfig(rank=2))
    module.configure_model()
    tiny_models.wake(module, size=0.3)
    if task is DPO:
        module.reference.kind = "adapter_off"  # else the policy begins as its own reference
    loader = pairs.loader(4, count=4, **({} if weights is None else {"weights": weights}))
    with torch.no_grad():
        found = module.predict_step(next(iter(loader)), 0)
    found["accuracy"] = found["margin"] > 0
    factors = torch.ones(4) if weights is None else torch.tensor(weights)
    runner = pairs.fit(module, tmp_path, loader, max_steps=1)
    logged = {name: value for name, value in runner.callback_metrics.items() if name.startswith("train_")}
    sides = {"chosen_reward", "rejected_reward"} if task is DPO else set()
    assert logged.keys() == {f"train_{name}" for name in {"loss", "margin", "accuracy"} | sides}
    for name, value in logged.items():
        expected = (found[name.removeprefix("train_")] * factors).sum() / max(1e-9, float(factors.sum()))
        assert float(value) == pytest.approx(float(expected), rel=1e-5, abs=1e-7)


def test_weights_count_in_float32_whatever_the_precision_of_a_batch() -> None:
    batch = {"input_ids": torch.ones(257, 2, 3), "weights": torch.ones(257, dtype=torch.bfloat16)}
    assert float(weights_of(batch).sum()) == 257
