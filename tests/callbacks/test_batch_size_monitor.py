"""The monitor sees what autograd gives micro-batch by micro-batch, and leaves the run as it is (V9, F23, F24)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.callbacks import BatchSizeMonitor
from lightning_lora.callbacks import batch_size_monitor as under_test
from lightning_lora.events import read_events
from lightning_lora.functional.noise_scale import signal_and_trace
from lightning_lora.token_loss import TokenWeightedLoss
from tests import toys

pytestmark = toys.expected_warnings


class Double(toys.Toy):
    """In float64, so that sums in another order agree to 1e-12."""

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.apply_lora()
        self.double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([part.double() for part in batch], batch_idx)


class Samples(BatchSizeMonitor):
    """Keeps every sample."""

    def __init__(self, **options: Any) -> None:
        super().__init__(warmup_steps=0, every_n_steps=1, **options)
        self.samples: list[Any] = []

    def _judge(self, trainer: Trainer, pl_module: LightningModule, sample: Any) -> None:
        self.samples.append(sample)
        super()._judge(trainer, pl_module, sample)


def fit(tmp_path: Path, rows: int, batch: int, accumulate: int, module: Any = None, **options: Any) -> Samples:
    monitor = Samples()
    callbacks = [monitor, *options.pop("callbacks", [])]
    trainer = toys.trainer(tmp_path, accumulate_grad_batches=accumulate, callbacks=callbacks, **options)
    trainer.fit(module or Double(), toys.loader(rows, batch))
    return monitor


def by_hand(rows: int, batch: int) -> tuple[Tensor, Tensor]:
    """Square norms of micro-batches of the first step, and of their mean."""
    module: Any = Double()
    module.configure_model()
    gradients = []
    for micro_batch in toys.loader(rows, batch):
        module.zero_grad()
        module.training_step(micro_batch, 0).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    stacked = torch.stack(gradients)
    return stacked.square().sum(1), stacked.mean(0).square().sum()


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 8), (8, 4), (16, 2)])
def test_the_first_step_is_what_autograd_gives_by_hand(batch: int, accumulate: int, tmp_path: Path) -> None:
    (sample,) = fit(tmp_path, 32, batch, accumulate).samples
    squares, mean_square = by_hand(32, batch)
    signal, trace = signal_and_trace(squares, mean_square, batch)
    assert sample.signal == pytest.approx(float(signal), rel=1e-12)
    assert sample.trace == pytest.approx(float(trace), rel=1e-12)
    assert (sample.num_rows, sample.num_micro_batches) == (32, accumulate)


def test_clipping_comes_after_the_measurement(tmp_path: Path) -> None:
    plain = fit(tmp_path, 32, 4, 8).samples
    assert fit(tmp_path, 32, 4, 8, gradient_clip_val=0.01).samples == plain


def test_a_short_last_window_is_scaled_like_a_full_one(tmp_path: Path) -> None:
    """24 rows in micro-batches of 4: windows of 4 and of 2, which Lightning divides by 4 as well."""
    module: Any = Double()
    module.learning_rate = 0.0
    first, last = fit(tmp_path, 24, 4, 4, FrozenRate()).samples
    assert (first.num_micro_batches, last.num_micro_batches) == (4, 2)
    squares, _ = by_hand(24, 4)
    assert last.signal + last.trace / 4 == pytest.approx(float(squares[4:].mean()), rel=1e-12)


class FrozenRate(Double):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


def test_a_run_with_the_monitor_is_bit_equal_to_one_without(tmp_path: Path) -> None:
    modules = [toys.Toy(), toys.Toy()]
    for module, callbacks in zip(modules, ([BatchSizeMonitor(warmup_steps=0)], []), strict=True):
        torch.manual_seed(0)
        toys.trainer(tmp_path, accumulate_grad_batches=2, max_epochs=3, callbacks=callbacks).fit(
            module, toys.loader(16, 2)
        )
    assert toys.same(*map(toys.snapshot, modules))


def test_a_monitor_that_fails_is_taken_off_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: Any) -> int:
        raise_here.append(1)
        return 0

    raise_here: list[int] = []
    monkeypatch.setattr(under_test, "count_rows", fail)
    monitor = Samples()
    trainer = toys.trainer(tmp_path, accumulate_grad_batches=2, max_epochs=2, callbacks=[monitor])
    with pytest.warns(UserWarning, match="batch-size monitor is off from step 0 on: the batch holds no tensor"):
        trainer.fit(toys.Toy(), toys.loader(16, 2))
    assert trainer.global_step == 8
    assert not monitor.samples


def test_every_sample_is_an_event_of_the_run(tmp_path: Path) -> None:
    monitor = fit(tmp_path, 64, 4, 2, max_epochs=5)
    events = list(read_events(tmp_path))
    assert len(events) == len(monitor.samples) == 40
    assert [event["gns/signal_sq"] for event in events] == [sample.signal for sample in monitor.samples]
    assert events[-1]["state"] == monitor.state == "step-starved"
    first, second = monitor.summary(toys.trainer(tmp_path))[0], monitor.state
    assert first.startswith(f"batch size: {second} (8 rows a step")


class Tokens(TokenWeightedLoss, Double):
    """A loss summed over as many tokens as each row says."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, wanted = (part.double() for part in batch)
        mask = inputs > 0
        losses = (self.net(inputs) - wanted).square().sum(1) * mask.sum(1)
        return self.token_loss(losses.sum(), mask.sum())


def test_a_loss_summed_over_tokens_counts_rows_by_what_they_add(tmp_path: Path) -> None:
    """Per row: its sum of losses over the mean number of tokens of a row; micro-batches weigh by their rows."""
    (sample,) = fit(tmp_path, 30, 8, 4, Tokens()).samples  # 8, 8, 8 and 6 rows
    module: Any = Tokens()
    module.configure_model()
    gradients, sizes, num_tokens = [], [], 0
    for inputs, wanted in toys.loader(30, 8):
        module.zero_grad()
        mask = inputs > 0
        losses = (module.net(inputs.double()) - wanted.double()).square().sum(1) * mask.sum(1)
        losses.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
        sizes.append(len(inputs))
        num_tokens += int(mask.sum())
    rows = torch.tensor(sizes, dtype=torch.float64)
    means = torch.stack(gradients) / rows[:, None] / (num_tokens / 30)
    mean = (means * rows[:, None]).sum(0) / 30
    signal, trace = signal_and_trace(means.square().sum(1), mean.square().sum(), rows)
    assert sample.signal == pytest.approx(float(signal), rel=1e-12)
    assert sample.trace == pytest.approx(float(trace), rel=1e-12)
    assert sample.num_rows == 30
