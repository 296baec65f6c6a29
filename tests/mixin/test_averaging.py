"""Lightning's weight averaging works on the adapters and resumes, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_lora import ConfigError, LoRAConfig, inject_lora, lora_state_dict
from lightning_lora.callbacks import LoRA, LoRAGuard
from tests.support import toys
from tests.support.toys import Plain, Toy, fit

pytestmark = toys.expected_warnings


def test_stochastic_weight_averaging_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"StochasticWeightAveraging.*Use AdapterEMA"):
        fit(Toy(), tmp_path, callbacks=[StochasticWeightAveraging(0.1)])


def test_ema_averages_the_adapters_and_resumes(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Toy, Any]:
        module = Toy()
        runner = toys.trainer(tmp_path, max_epochs=epochs, callbacks=[EMAWeightAveraging(decay=0.5)])
        runner.fit(module, toys.loader(), ckpt_path=ckpt_path, weights_only=True)
        return module, runner

    base = toys.base_of(Toy())
    whole, _ = run(2)
    _, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    kept = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert all("lora_" in name for name in [*kept["state_dict"], *kept.get("current_model_state", {})])
    assert toys.same(base, toys.base_of(whole))
    assert all(toys.moved(whole))


def lists_of_ones_own(old: Any, new: Any, count: Any) -> None:
    """An average in place, with a rounding for each of its two products."""
    for average, weight in zip(old, new, strict=True):
        average.mul_(0.9).add_(weight, alpha=0.1)


AVERAGES: dict[str, Any] = {
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "EMA by lists": lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "lists of one's own": lambda: WeightAveraging(multi_avg_fn=lists_of_ones_own),
    "a user's own": lambda: WeightAveraging(avg_fn=lambda old, new, count: 0.7 * old + 0.3 * new, use_buffers=False),
    "equal weights": WeightAveraging,
}


@pytest.mark.parametrize("way", ["mixin", "callback", "by hand"])
@pytest.mark.parametrize("name", AVERAGES)
def test_the_average_of_a_frozen_weight_is_that_weight(name: str, way: str, tmp_path: Path) -> None:
    """Ten sums of 0.9 and 0.1 of a weight are that weight only up to rounding."""
    module = Toy() if way == "mixin" else Plain()
    if way == "by hand":
        inject_lora(module, LoRAConfig(rank=2))
    before = toys.base_of(module)
    # By hand nothing but the guard knows of the adapters.
    own = {"mixin": [], "callback": [LoRA(LoRAConfig(rank=2))], "by hand": [LoRAGuard()]}
    fit(module, tmp_path, max_epochs=3, callbacks=[*own[way], AVERAGES[name]()])
    assert toys.same(before, toys.base_of(module))
    assert all(toys.moved(module))


def test_adapters_are_averaged_as_lightning_averages_them(tmp_path: Path) -> None:
    weights: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            weights.append(lora_state_dict(pl_module))

    module = Toy()
    fit(module, tmp_path, callbacks=[Look(), EMAWeightAveraging(decay=0.9)])
    average = weights[0]
    for step in weights[1:]:
        average = {name: 0.9 * average[name] + 0.1 * tensor for name, tensor in step.items()}
    for name, tensor in lora_state_dict(module).items():
        torch.testing.assert_close(tensor, average[name])


class SaveOnce(Callback):
    """A checkpoint in the middle of a run, where averaging keeps two copies of the weights."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_resuming_with_ema_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    whole = Toy()
    fit(whole, tmp_path, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5), SaveOnce(path, step=4)])
    kept = torch.load(path, weights_only=True)
    assert [name for name in kept["current_model_state"] if "lora_" not in name] == []
    resumed = Toy()
    runner = toys.trainer(tmp_path, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5)])
    runner.fit(resumed, toys.loader(), ckpt_path=path, weights_only=True)
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))
