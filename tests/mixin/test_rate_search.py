"""The learning rate that Lightning finds is the one that trains: adapters at ten times it, as in the search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner.tuning import Tuner
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, LoRAMixin
from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.callbacks import LoRA
from lightning_lora.mixin.run_hooks import run_memory
from tests.support import toys
from tests.support.toys import Plain

pytestmark = toys.expected_warnings


class Rated(Plain):
    """Records at which rates it makes its steps."""

    def __init__(self, warmup: int = 0) -> None:
        super().__init__()
        self.learning_rate, self.warmup = 1e-3, warmup
        self.rates: list[tuple[float, ...]] = []

    def groups(self) -> Any:
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": self.learning_rate}]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.groups())
        if not self.warmup:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(tuple(group["lr"] for group in optimizer.param_groups))


class RatedToy(LoRAMixin, Rated):
    lora = LoRAConfig(rank=2, targets=["first"], trainable=["second"])

    def groups(self) -> Any:
        return self.lora_parameter_groups(self.learning_rate)


def loader() -> DataLoader[Any]:
    return toys.loader(count=64)


def find(module: Any, folder: Path, **options: Any) -> Any:
    finder: Any = Tuner(toys.trainer(folder)).lr_find(module, loader(), num_training=30, max_lr=0.1, **options)
    return finder


@pytest.mark.parametrize("updates", [True, False])
def test_adapters_train_at_the_rate_that_was_best_in_the_search(updates: bool, tmp_path: Path) -> None:
    module = RatedToy()
    finder = find(module, tmp_path, update_attr=updates)
    searched, rate = module.rates, finder.suggestion()
    # The first step of a search is at its lowest rate.
    assert [full for _, full in searched] == pytest.approx(finder.results["lr"])
    assert [adapters for adapters, _ in searched] == pytest.approx([10 * lr for lr in finder.results["lr"]])
    if not updates:
        assert module.learning_rate == 1e-3
        module.learning_rate = rate
    module.rates = []
    toys.trainer(tmp_path, max_steps=1).fit(module, loader())
    assert module.learning_rate == rate
    assert module.rates == [pytest.approx((10 * rate, rate))]
    assert min(abs(adapters - 10 * rate) for adapters, _ in searched) < 1e-9


def test_the_callback_finds_the_rate_of_an_optimizer_that_knows_no_adapters(tmp_path: Path) -> None:
    module = Rated()
    trainer = toys.trainer(tmp_path, callbacks=[LoRA(LoRAConfig(rank=2))])
    finder: Any = Tuner(trainer).lr_find(module, loader(), num_training=30, max_lr=0.1)
    assert [rate for (rate,) in module.rates] == pytest.approx(finder.results["lr"])
    module.rates = []
    toys.trainer(tmp_path, max_steps=1, callbacks=[LoRA(LoRAConfig(rank=2))]).fit(module, loader())
    assert module.rates == [(finder.suggestion(),)]


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_run_that_begins_with_a_search_goes_on_at_the_rate_it_found(warmup: int, tmp_path: Path) -> None:
    module, search = RatedToy(warmup), LearningRateFinder(num_training_steps=30, max_lr=0.1)
    trainer = toys.trainer(tmp_path, callbacks=[search], max_steps=8)
    trainer.fit(module, loader())
    assert search.optimal_lr is not None
    rate: Any = search.optimal_lr.suggestion()
    shape = [min(1.0, step / warmup) if warmup else 1.0 for step in range(8)]
    assert module.rates[-8:] == [pytest.approx((10 * rate * part, rate * part)) for part in shape]


class SearchInEpoch(LearningRateFinder):
    """Searches in the first epoch, as Lightning's documentation shows."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        return

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.optimal_lr is None:
            self.lr_find(trainer, pl_module)


def test_a_search_within_an_epoch_is_alike(tmp_path: Path) -> None:
    module, search = RatedToy(), SearchInEpoch(num_training_steps=30, max_lr=0.1)
    toys.trainer(tmp_path, callbacks=[search], max_epochs=2).fit(module, loader())
    assert search.optimal_lr is not None
    rate: Any = search.optimal_lr.suggestion()
    assert module.rates[-1] == pytest.approx((10 * rate, rate))


def test_a_search_that_sets_nothing_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    runs = []
    for callbacks in ([], [LearningRateFinder(num_training_steps=5, update_attr=False)]):
        torch.manual_seed(0)
        module = RatedToy()
        trainer = toys.trainer(tmp_path, callbacks=callbacks, max_epochs=2)
        trainer.fit(module, toys.loader(count=16))
        runs.append((toys.snapshot(module), trainer.global_step, module.rates[-16:]))
    (alone, steps, rates), (searched, other_steps, other_rates) = runs
    assert (steps, rates) == (other_steps, other_rates)
    assert toys.same(alone, searched)


def test_a_search_leaves_nothing_for_the_next_run(tmp_path: Path) -> None:
    module = RatedToy()
    find(module, tmp_path)

    class Other(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert run_memory(module).optimizer_states is None

    # Other groups than those of the search, whose state would not fit.
    module.groups = Rated.groups.__get__(module)  # pyright: ignore[reportAttributeAccessIssue]
    toys.trainer(tmp_path, callbacks=[Other()]).fit(module, loader())


class Tokens(LoRAMixin, TokenWeightedLoss, Rated):
    lora = LoRAConfig(rank=2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss, count = (self(x) - y).square().mean(-1), batch_idx % 3 + 1
        # As if a batch had other tokens than the next: ten or thirty of the same loss.
        return self.token_loss(loss.mean() * 10 * count, torch.tensor(10 * count))

    def groups(self) -> Any:
        return self.lora_parameter_groups(self.learning_rate)


def test_a_search_compares_losses_per_token(tmp_path: Path) -> None:
    module = Tokens()
    x, y = toys.rows(2).tensors
    batches = DataLoader([(x, y)] * 12, batch_size=None)  # pyright: ignore[reportArgumentType]
    finder: Any = Tuner(toys.trainer(tmp_path)).lr_find(module, batches, num_training=6, min_lr=1e-12, max_lr=1e-11)
    expected = float((toys.Plain()(x).detach() - y).square().mean())
    # Lightning's smoothing begins one step late, and so its first value is half of the first loss.
    smoothed, average = [], 0.0
    for step in range(len(finder.results["loss"])):
        average = 0.98 * average + 0.02 * expected
        smoothed.append(average / (1 - 0.98 ** (step + 2)))
    assert finder.results["loss"] == pytest.approx(smoothed, rel=1e-4)


def test_with_lora_plus_and_patterns_each_group_is_searched_and_trains_at_its_multiple(
    tmp_path: Path, caplog: Any
) -> None:
    module = RatedToy()
    module.lora = LoRAConfig(
        rank=2, targets=["first"], trainable=["second"], lora_plus_ratio=4.0, lr_multiplier_pattern={"second": 0.5}
    )
    finder = LearningRateFinder(num_training_steps=30, max_lr=0.1)
    with caplog.at_level("INFO"):
        toys.trainer(tmp_path, callbacks=[finder], max_steps=1).fit(module, loader())
    assert finder.optimal_lr is not None
    rate = finder.optimal_lr.suggestion()
    assert rate is not None
    assert module.rates[0] == pytest.approx([multiple * module.rates[0][2] * 2 for multiple in (10, 40, 0.5)])
    assert module.rates[-1] == pytest.approx((10 * rate, 40 * rate, 0.5 * rate))
    assert f"learning rate {rate:g} x 40 = {40 * rate:g} for B of 1 adapters" in caplog.text
