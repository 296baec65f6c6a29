"""The noise scale of preferences is that of the gradients of pairs, one at a time, by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import LoRAConfig, lora_layers
from lightning_lora.batch.noise.frozen_weights import WeightSketches
from lightning_lora.batch.noise.noise_scale import signal_and_trace
from lightning_lora.tasks import DPO, RewardModel
from tests.support import tiny_models, toys
from tests.support.monitored import Samples
from tests.tasks.rl import pairs

pytestmark = [
    *toys.expected_warnings,
    *toys.monitor_warnings,
    pytest.mark.filterwarnings("ignore:Some weights of .* were not initialized"),
]
PAIRS = 4


def make(task: Any, folder: Path, **lora: Any) -> Any:
    """A task that has learned something before, in float64."""
    torch.manual_seed(0)
    options = {"reference": "adapter_off", "beta": 0.5} if task is DPO else {}
    module = task(pairs.folder_of_llama(folder), learning_rate=1e-3, lora=LoRAConfig(rank=2, **lora), **options)
    with toys.trainer(folder, precision="64-true").init_module():
        module.configure_model()
    tiny_models.wake(module, size=0.2)
    return module


def by_hand(module: Any, size: int, parameters: Sequence[Tensor]) -> tuple[float, float]:
    """Signal and trace from the gradients of ``size`` pairs each."""
    batch, gradients = next(iter(pairs.loader(PAIRS, count=PAIRS))), []
    for start in range(0, PAIRS, size):
        part = {name: tensor[start : start + size] for name, tensor in batch.items()}
        found = torch.autograd.grad(module.predict_step(part, 0)["loss"].mean(), parameters)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    stacked = torch.stack(gradients)
    signal, trace = signal_and_trace(stacked.square().sum(1), stacked.mean(0).square().sum(), size)
    return float(signal), float(trace)


@pytest.mark.parametrize(("task", "accumulate"), [(DPO, 1), (DPO, 2), (RewardModel, 2), (RewardModel, 4)])
def test_a_sample_is_what_autograd_gives_pair_by_pair(task: Any, accumulate: int, tmp_path: Path) -> None:
    module, monitor = make(task, tmp_path), Samples()
    # Of a single micro-batch, the samples are its pairs.
    size = 1 if accumulate == 1 else PAIRS // accumulate
    expected = by_hand(module, size, [p for p in module.parameters() if p.requires_grad])
    options = {"accumulate_grad_batches": accumulate, "callbacks": [monitor], "precision": "64-true"}
    pairs.fit(module, tmp_path, pairs.loader(PAIRS // accumulate, count=PAIRS), **options)
    (sample,) = monitor.samples
    assert (sample.signal, sample.trace) == pytest.approx(expected, rel=1e-9)
    assert sample.num_rows == PAIRS


def test_the_noise_of_the_frozen_weights_is_that_of_pairs_too(tmp_path: Path) -> None:
    """Weights of 32 x 32 at most are sketched by themselves."""
    module = make(DPO, tmp_path, targets=["q_proj", "o_proj"])
    sketches = WeightSketches(module, [p for p in module.parameters() if p.requires_grad], None)
    sketches.start(0)
    module.predict_step(next(iter(pairs.loader(PAIRS, count=PAIRS))), 0)["loss"].mean().backward()
    sketches.add(PAIRS)
    sample = sketches.finish(True)
    weights = [layer.weight.requires_grad_() for layer in lora_layers(module).values()]
    assert sample is not None
    assert (sample.signal, sample.trace) == pytest.approx(by_hand(module, 1, weights), rel=1e-9)
