"""The monitor sees what autograd gives micro-batch by micro-batch, and leaves the run as it is (V9, F23, F24)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig
from lightning_lora.batch.noise.noise_scale import signal_and_trace
from lightning_lora.batch.reading import advice
from lightning_lora.batch.remarks import RepeatedRows
from lightning_lora.callbacks import BatchSizeMonitor
from lightning_lora.cli.embedded import MODEL, TRAIN
from lightning_lora.data import SFTDataModule
from lightning_lora.effective_batch import EffectiveBatch
from lightning_lora.errors import ConfigError
from lightning_lora.files.events import read_events
from lightning_lora.tasks import CausalLM
from tests.support import toys
from tests.support.monitored import Double, EveryStep, FrozenRate, Samples, Tokens, fit

pytestmark = [*toys.expected_warnings, *toys.monitor_warnings]


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
    first, last = fit(tmp_path, 24, 4, 4, FrozenRate()).samples
    assert (first.num_micro_batches, last.num_micro_batches) == (4, 2)
    squares, _ = by_hand(24, 4)
    assert last.signal + last.trace / 4 == pytest.approx(float(squares[4:].mean()), rel=1e-12)


def test_a_run_with_the_monitor_is_bit_equal_to_one_without(tmp_path: Path) -> None:
    modules = [toys.Toy(), toys.Toy()]
    for module, callbacks in zip(modules, ([EveryStep()], []), strict=True):
        torch.manual_seed(0)
        toys.trainer(tmp_path, accumulate_grad_batches=2, max_epochs=3, callbacks=callbacks).fit(
            module, toys.loader(16, 2)
        )
    assert toys.same(*map(toys.snapshot, modules))


def test_a_monitor_that_fails_is_taken_off_and_the_run_goes_on(tmp_path: Path) -> None:
    monitor = Samples()
    trainer = toys.trainer(tmp_path, accumulate_grad_batches=2, max_epochs=2, callbacks=[monitor])
    module, plain = Countless(), Countless()
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="monitor measures nothing: it failed at step 0: the batch holds no tensor"):
        trainer.fit(module, toys.loader(16, 2))
    assert trainer.global_step == 8
    assert not monitor.samples
    torch.manual_seed(0)
    toys.trainer(tmp_path, accumulate_grad_batches=2, max_epochs=2).fit(plain, toys.loader(16, 2))
    assert toys.same(toys.snapshot(module), toys.snapshot(plain))


class Wrapped:
    """A batch that hides its tensors."""

    def __init__(self, parts: list[Tensor]) -> None:
        self.parts = parts


class Countless(toys.Toy):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return Wrapped(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch.parts, batch_idx)


class Breaking(Samples):
    """Fails when it writes its third sample, as with a full disk."""

    def _take(self, trainer: Trainer, sample: Any, tokens: int | None) -> None:
        super()._take(trainer, sample, tokens)
        if len(self.samples) == 3:
            raise OSError("no space left on device")


def test_a_sample_that_cannot_be_written_ends_the_monitor_and_not_the_run(tmp_path: Path) -> None:
    monitor = Breaking()
    trainer = toys.trainer(tmp_path, accumulate_grad_batches=2, max_epochs=2, callbacks=[monitor])
    with pytest.warns(UserWarning, match="it failed at step 2: no space left on device"):
        trainer.fit(toys.Toy(), toys.loader(16, 2))
    assert trainer.global_step == 8
    assert len(monitor.samples) == 3
    assert not any(p._backward_hooks for p in trainer.lightning_module.parameters())


def test_every_sample_is_an_event_of_the_run(tmp_path: Path) -> None:
    monitor = fit(tmp_path, 64, 4, 2, max_epochs=5)
    start, *events = read_events(tmp_path)
    assert start == {"event": "batch", "step": 0, "batch/k": 2, "batch/rows": 8, "batch/steps_total": 40.0}
    assert len(events) == len(monitor.samples) == 40
    assert [event["gns/signal_sq"] for event in events] == [sample.signal for sample in monitor.samples]
    assert events[-1]["state"] == monitor.state == "step-starved"


def test_a_short_last_step_says_nothing_of_the_batch(tmp_path: Path) -> None:
    monitor = fit(tmp_path, 62, 4, 2, max_epochs=5)  # seven steps of 8 rows and one of 6 in each epoch
    assert {sample.num_rows for sample in monitor.samples} == {8, 6}
    assert monitor.samples[-1].num_rows == 6
    _, *events = read_events(tmp_path)
    assert {event["batch/rows"] for event in events} == {8}
    assert monitor.estimate is not None
    assert monitor._judge.reading.fill == pytest.approx(8 / monitor.estimate.value)


def test_the_end_is_told_in_two_lines_and_drawn(tmp_path: Path) -> None:
    monitor = fit(tmp_path, 64, 4, 2, max_epochs=25)
    first, second = monitor.summary(monitor_trainer(tmp_path))
    assert first.startswith(f"batch size: {monitor.state} (effective batch 8 = 4 rows x 2 accumulated x 1 device, 200")
    assert ", 200 measured" in first
    assert second == advice(monitor.reading, EffectiveBatch(4, 2, 1), 200)
    assert (tmp_path / "batch_size.png").read_bytes().startswith(b"\x89PNG")


def monitor_trainer(tmp_path: Path) -> Trainer:
    trainer = toys.trainer(tmp_path, accumulate_grad_batches=2, max_epochs=25)
    trainer.fit(toys.Toy(), toys.loader(64, 4))
    return trainer


def test_few_steps_are_warned_of_with_the_accumulation_that_makes_a_hundred(tmp_path: Path) -> None:
    wanted = r"40 optimizer steps are few whatever the noise: set accumulate_grad_batches=2 for 4 rows a step"
    with pytest.warns(UserWarning, match=wanted):
        fit(tmp_path, 64, 2, 8, max_epochs=10)


def test_rows_in_stored_order_are_warned_of_and_shuffled_ones_are_not(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def said(loader: DataLoader[Any]) -> bool:
        recwarn.clear()
        toys.trainer(tmp_path, accumulate_grad_batches=2, callbacks=[Samples()]).fit(toys.Toy(), loader)
        return any("in the order they are stored in" in str(warning.message) for warning in recwarn)

    assert said(toys.loader(16, 2))
    assert not said(DataLoader(toys.rows(16), batch_size=2, shuffle=True))


def test_rows_that_a_step_has_twice_are_warned_of(tmp_path: Path) -> None:
    twice = TensorDataset(*(torch.cat([part, part]) for part in toys.rows(8).tensors))
    trainer = toys.trainer(tmp_path, accumulate_grad_batches=4, callbacks=[Samples()])
    with pytest.warns(UserWarning, match="8 of 16 rows were in their optimizer step before"):
        trainer.fit(toys.Toy(), DataLoader(twice, batch_size=4))


@pytest.mark.parametrize(
    ("rows", "repeated"),
    [
        ({"input_ids": [[5, 6, 0], [5, 6, 7]], "attention_mask": [[1, 1, 0], [1, 1, 1]]}, 0),
        ({"input_ids": [[5, 6, 0], [5, 6, 9]], "attention_mask": [[1, 1, 0], [1, 1, 0]]}, 1),
        ({"pixels": [[5, 6, 0], [5, 6, 0]], "label": [1, 2]}, 0),
    ],
)
def test_rows_are_the_same_if_all_but_their_padding_is(
    rows: dict[str, Any], repeated: int, recwarn: pytest.WarningsRecorder
) -> None:
    check = RepeatedRows()
    check.start()
    check.add({name: torch.tensor(values) for name, values in rows.items()})
    check.finish()
    check.warn()
    assert sum("were in their optimizer step before" in str(warning.message) for warning in recwarn) == repeated


def test_a_change_of_accumulation_begins_anew(tmp_path: Path) -> None:
    class Halve(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            trainer.accumulate_grad_batches = 4 >> trainer.current_epoch

    monitor = fit(tmp_path, 64, 4, 4, max_epochs=2, callbacks=[Halve()])
    counts = [event["gns/n"] for event in read_events(tmp_path) if event["event"] == "noise_scale"]
    assert counts == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8]
    assert monitor.batch == EffectiveBatch(4, 2, 1)


def test_a_run_that_goes_on_measures_on(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 64, 4, 2, max_epochs=4)
    first = Samples()
    trainer = toys.trainer(tmp_path, accumulate_grad_batches=2, max_epochs=2, callbacks=[first])
    trainer.fit(Double(), toys.loader(64, 4))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = Samples()
    toys.trainer(tmp_path, accumulate_grad_batches=2, max_epochs=4, callbacks=[second]).fit(
        Double(), toys.loader(64, 4), ckpt_path=str(tmp_path / "half.ckpt")
    )
    assert len(second.samples) == 16
    assert second.estimate == whole.estimate


def test_a_run_that_goes_on_at_a_short_batch_knows_the_batch(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "3.ckpt")

    for ckpt_path, callbacks in ((None, [Save()]), (str(tmp_path / "3.ckpt"), [])):
        monitor = BatchSizeMonitor()
        trainer = toys.trainer(tmp_path, max_epochs=2, callbacks=[monitor, *callbacks])
        trainer.fit(toys.Toy(), toys.loader(7, 2), ckpt_path=ckpt_path)  # of whose four batches the last is of one row
        assert monitor.batch == EffectiveBatch(2, 1, 1)


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


def test_the_batch_is_counted_in_supervised_tokens_too(tmp_path: Path) -> None:
    data = SFTDataModule(str(TRAIN), batch_size=2, max_rows=16)
    module = CausalLM(str(MODEL), lora=LoRAConfig(rank=1))
    toys.trainer(tmp_path, accumulate_grad_batches=2, callbacks=[Samples()]).fit(module, data)
    steps = [event["batch/tokens"] for event in read_events(tmp_path) if event["event"] == "noise_scale"]
    assert len(steps) == 4
    assert sum(steps) == data.statistics["train"].supervised_tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"calibration": 0.0}, r"calibration must be a positive number, got 0\.0"),
        ({"calibration": float("inf")}, "calibration must be a positive number, got inf"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchSizeMonitor(**settings)
