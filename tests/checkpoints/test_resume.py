"""A run that was interrupted goes on as if nothing had happened: the whole checkpoint at its end is bit-equal."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops import evaluation_loop, fit_loop, training_epoch_loop
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from lightning_lora import LoRAConfig
from lightning_lora.callbacks import LoRA
from lightning_lora.checkpoints import loop_position
from lightning_lora.checkpoints.random_state import random_state, set_random_state
from lightning_lora.checkpoints.resume import KEY, RunMemory
from tests.support import resuming, toys
from tests.support.resuming import NUM_BATCHES, Dicey, DiceyFull, DiceyLoRA, run, shuffled, unlike

CPU = torch.device("cpu")

pytestmark = [*toys.expected_warnings, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")]


def check(make: Callable[[], LightningModule], folder: Path, places: list[str], **options: Any) -> None:
    whole = run(make, folder, **options)
    for place in places:
        found = unlike(whole, run(make, folder, folder / f"{place}.ckpt", **options))
        assert not found, f"{place}: {found[:5]}"


BATCHES = [f"batch-{epoch}-{batch}" for epoch in (0, 1) for batch in range(1, NUM_BATCHES + 1)]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("make", [DiceyLoRA, DiceyFull])
def test_after_every_batch(make: Callable[[], LightningModule], accumulate: int, tmp_path: Path) -> None:
    check(make, tmp_path, BATCHES, accumulate_grad_batches=accumulate, val_check_interval=3)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("interval", [1.0, 3, 5])
def test_around_validation_and_the_end_of_an_epoch(accumulate: int, interval: float, tmp_path: Path) -> None:
    last = NUM_BATCHES if interval == 1.0 else int(interval)
    places = ["batch-0-7", "batch-1-7", "epoch-0", "epoch-1", f"validation-0-{last}", f"validation-1-{last}"]
    check(DiceyLoRA, tmp_path, places, accumulate_grad_batches=accumulate, val_check_interval=interval)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_a_number_of_steps(accumulate: int, tmp_path: Path) -> None:
    limit = {"max_epochs": -1, "max_steps": 18 if accumulate == 1 else 8}
    places = ["batch-0-4", "batch-0-7", "batch-1-1", "batch-1-7", "epoch-0", "epoch-1", "validation-1-3"]
    check(DiceyLoRA, tmp_path, places, accumulate_grad_batches=accumulate, val_check_interval=3, **limit)


def test_without_validation(tmp_path: Path) -> None:
    class Unwatched(DiceyLoRA):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)

    places = ["batch-0-4", "batch-0-7", "batch-1-7", "epoch-0"]
    check(Unwatched, tmp_path, places, is_validated=False, accumulate_grad_batches=3)


def test_a_run_that_was_stopped_within_an_epoch_is_prolonged(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": -1, "val_check_interval": 3}
    whole = run(DiceyLoRA, tmp_path, max_steps=12, **options)
    run(DiceyLoRA, tmp_path / "half", max_steps=5, **options)
    resumed = run(DiceyLoRA, tmp_path, tmp_path / "half" / "end" / "end.ckpt", max_steps=12, **options)
    assert not unlike(whole, resumed)


@pytest.mark.parametrize(
    ("persistent", "places"),
    [
        (False, ["batch-0-3", "batch-1-3", "epoch-0"]),
        pytest.param(False, ["batch-0-4", "batch-1-7", "validation-1-3", "epoch-1"], marks=pytest.mark.slow),
        pytest.param(True, ["batch-0-3", "batch-1-4", "epoch-0", "batch-0-7"], marks=pytest.mark.slow),
    ],
)
def test_with_workers(persistent: bool, places: list[str], tmp_path: Path) -> None:
    loader = lambda: shuffled(num_workers=2, persistent_workers=persistent)  # noqa: E731
    check(DiceyLoRA, tmp_path, places, loader=loader, accumulate_grad_batches=3, val_check_interval=3)


@pytest.mark.parametrize(("dropout", "num_workers"), [(0.0, 0), (0.1, 0), pytest.param(0.1, 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_a_cosine_schedule(
    accumulate: int, shuffle: bool, dropout: float, num_workers: int, tmp_path: Path
) -> None:
    """Fault F07: first, middle and last step of an epoch, and its end."""
    rows = toys.rows(2 * NUM_BATCHES)
    loader = lambda: DataLoader(rows, batch_size=2, shuffle=shuffle, num_workers=num_workers)  # noqa: E731
    places = ["batch-0-3", "batch-0-7", "epoch-0", "batch-1-1"]
    make = lambda: resuming.Smooth(dropout)  # noqa: E731
    check(make, tmp_path, places, loader=loader, is_validated=False, max_epochs=2, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_module_that_one_cannot_edit_goes_on(accumulate: int, tmp_path: Path) -> None:
    def check_one(place: str | None = None) -> resuming.Outcome:
        path = None if place is None else tmp_path / f"{place}.ckpt"
        callbacks = [LoRA(LoRAConfig(rank=2, dropout=0.2))]
        options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "val_check_interval": 3}
        return run(Foreign, tmp_path, path, callbacks=callbacks, **options)

    whole = check_one()
    assert any("lora_A" in name for name in whole.checkpoint["state_dict"])
    for place in ("batch-0-3", "batch-0-7", "validation-0-3", "epoch-0", "batch-1-1"):
        assert not unlike(whole, check_one(place)), place


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loader_with_a_generator_of_its_own(num_workers: int, tmp_path: Path) -> None:
    options = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    loader = lambda: shuffled(generator=torch.Generator().manual_seed(3), **options)  # noqa: E731
    check(DiceyLoRA, tmp_path, ["batch-0-3", "batch-1-3", "epoch-0"], loader=loader)


@pytest.mark.slow
def test_a_generator_used_before_the_first_epoch_is_said_to_be_unknown(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(3)
        torch.rand(1, generator=generator)
        return shuffled(generator=generator, num_workers=2)

    run(DiceyLoRA, tmp_path, loader=loader)
    with pytest.warns(UserWarning, match="the generator of a loader with workers had been drawn from"):
        run(DiceyLoRA, tmp_path, tmp_path / "batch-0-3.ckpt", loader=loader)


class Foreign(Dicey):
    """Its optimizer is built after `configure_model`, when the callback has put adapters in."""


class Counting(Dataset[list[Tensor]]):
    """Rows that note when they are read."""

    def __init__(self) -> None:
        self.rows = toys.rows(2 * NUM_BATCHES)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Tensor]:
        self.read.append(index)
        return [tensor + 0.01 * random.random() for tensor in self.rows[index]]


def test_no_row_is_read_again_and_random_rows_are_the_same(tmp_path: Path) -> None:
    data: list[Counting] = []

    def loader() -> DataLoader[Any]:
        data.append(Counting())
        return DataLoader(data[-1], batch_size=2, shuffle=True)

    check(DiceyLoRA, tmp_path, ["batch-1-4"], loader=loader)
    whole, resumed = (each.read for each in data)
    assert resumed == whole[2 * (NUM_BATCHES + 4) :]


def test_a_batch_sampler_of_ones_own_goes_on(tmp_path: Path) -> None:
    class Own(BatchSampler):
        def __iter__(self) -> Any:
            return iter(list(super().__iter__())[::-1])

    rows = toys.rows(2 * NUM_BATCHES)
    loader = lambda: DataLoader(rows, batch_sampler=Own(RandomSampler(rows), 2, drop_last=False))  # noqa: E731
    check(DiceyLoRA, tmp_path, ["batch-0-4", "batch-1-2", "epoch-0"], loader=loader)


def test_two_loaders_go_on_together(tmp_path: Path) -> None:
    class Both(DiceyLoRA):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

    loader = lambda: {"a": shuffled(), "b": shuffled(num_batches=12)}  # noqa: E731
    whole = run(Both, tmp_path, loader=loader)
    assert not unlike(whole, run(Both, tmp_path, tmp_path / "batch-1-4.ckpt", loader=loader))
    with pytest.warns(UserWarning, match="a DataLoader of 7 batches has begun again within the epoch"):
        run(Both, tmp_path, tmp_path / "batch-1-9.ckpt", loader=loader)


class Stream(IterableDataset[list[Tensor]]):
    def __iter__(self) -> Any:
        return iter(toys.rows(2 * NUM_BATCHES))


def test_what_cannot_be_exact_is_said_once(tmp_path: Path) -> None:
    loader = lambda: DataLoader(Stream(), batch_size=2)  # noqa: E731
    run(DiceyLoRA, tmp_path, loader=loader, val_check_interval=3)
    with pytest.warns(UserWarning, match="not exactly as it would have: the rows of an iterable dataset") as caught:
        run(DiceyLoRA, tmp_path, tmp_path / "batch-1-4.ckpt", loader=loader, val_check_interval=3)
    assert sum("not exactly" in str(warning.message) for warning in caught) == 1


def test_the_end_of_an_epoch_is_exact_with_an_iterable_dataset(tmp_path: Path) -> None:
    check(DiceyLoRA, tmp_path, ["epoch-0"], loader=lambda: DataLoader(Stream(), batch_size=2))


@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated")  # torchdata asks torch for it
@pytest.mark.parametrize(
    ("make", "num_workers"),
    [(DiceyLoRA, 0), (resuming.Smooth, 0), pytest.param(resuming.Smooth, 2, marks=pytest.mark.slow)],
)
def test_a_loader_that_keeps_its_position_is_asked_for_it(
    make: Callable[[], LightningModule], num_workers: int, tmp_path: Path
) -> None:
    stateful: Any = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    rows = toys.rows(2 * NUM_BATCHES)
    loader = lambda: stateful(rows, batch_size=2, shuffle=True, num_workers=num_workers)  # noqa: E731
    places = ["batch-0-4", "epoch-0"] if num_workers else ["batch-0-4", "batch-1-3", "epoch-0"]
    check(make, tmp_path, places, loader=loader, val_check_interval=3)


def test_a_file_written_by_other_ranks_is_read_with_a_warning(tmp_path: Path) -> None:
    run(DiceyLoRA, tmp_path)
    checkpoint = torch.load(tmp_path / "batch-1-4.ckpt", weights_only=True)
    checkpoint[KEY]["ranks"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="written by 2 ranks and is read by 1: random numbers start anew"):
        run(DiceyLoRA, tmp_path, tmp_path / "two.ckpt")


def test_a_newer_format_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    memory = RunMemory()
    with pytest.warns(UserWarning, match="resume format 99 is newer than 1"):
        memory.load({KEY: {"format": 99}})
    assert memory.loaded is None


def test_files_of_weights_only_hold_no_random_numbers(tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path)
    trainer.fit(DiceyFull(), shuffled(), toys.loader(4))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert KEY not in torch.load(tmp_path / "a.ckpt", weights_only=True)


def test_a_window_that_is_closed_is_not_saved(tmp_path: Path) -> None:
    run(DiceyLoRA, tmp_path, accumulate_grad_batches=3)
    gradients = {
        batch: torch.load(tmp_path / f"batch-0-{batch}.ckpt", weights_only=True)[KEY]["ranks"][0]["gradients"]
        for batch in range(1, NUM_BATCHES + 1)
    }
    assert [batch for batch, saved in gradients.items() if saved] == [1, 2, 4, 5]
    assert all("lora_" in name or "weight" in name or "bias" in name for name in gradients[1])


def test_lightning_calls_its_stages_what_we_call_them() -> None:
    assert fit_loop.RestartStage.RESTARTED_MID_EPOCH == loop_position._MID_EPOCH
    assert training_epoch_loop.RestartStage.RESTARTED_ON_LAST == loop_position._ON_LAST
    assert evaluation_loop.RestartStage.RESTARTED_MID_EVALUATION == loop_position._MID_EVALUATION
    for loop in (fit_loop, training_epoch_loop, evaluation_loop):
        assert loop.RestartStage.NONE == loop_position._NONE


def test_a_lightning_with_other_loops_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"exact resume knows Lightning 2.6; Lightning 2.* has no Loop.restarting"):
        loop_position._put(type("Loop", (), {})(), restarting=True)


def test_random_states_come_back() -> None:
    resuming.seed_all(5)
    draws = lambda: (random.random(), random.gauss(0, 1), numpy.random.randn(), torch.rand(2).tolist())  # noqa: E731
    draws()
    state = random_state(CPU)
    expected = draws(), draws()
    set_random_state(state, CPU)
    assert (draws(), draws()) == expected


# Each part of what we save is needed: without it the run that goes on is another one.
LOSSES: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "random numbers": ("batch-1-3", lambda entry: entry["ranks"][0].update(random=random_state(CPU))),
    "numpy's only": (
        "batch-1-3",
        lambda entry: entry["ranks"][0]["random"].update(numpy=random_state(CPU)["numpy"]),
    ),
    "python's only": (
        "batch-1-3",
        lambda entry: entry["ranks"][0]["random"].update(python=random_state(CPU)["python"]),
    ),
    "random numbers at the end of an epoch": (
        "epoch-0",
        lambda entry: entry["ranks"][0].update(random=random_state(CPU)),
    ),
    "where the epoch began": ("batch-1-3", lambda entry: entry["ranks"][0].update(before_iterators=random_state(CPU))),
    "gradients": ("batch-1-4", lambda entry: entry["ranks"][0].update(gradients={})),
    "position": ("batch-1-3", lambda entry: entry["position"].update(num_batches=2)),
}


@pytest.mark.parametrize("lost", LOSSES)
def test_every_part_of_what_is_saved_is_needed(lost: str, tmp_path: Path) -> None:
    place, lose = LOSSES[lost]
    whole = run(DiceyLoRA, tmp_path, accumulate_grad_batches=3, val_check_interval=3)
    checkpoint = torch.load(tmp_path / f"{place}.ckpt", weights_only=True)
    lose(checkpoint[KEY])
    torch.save(checkpoint, tmp_path / "less.ckpt")
    resumed = run(DiceyLoRA, tmp_path, tmp_path / "less.ckpt", accumulate_grad_batches=3, val_check_interval=3)
    assert unlike(whole, resumed)


@pytest.mark.parametrize("place", resuming.PLACES.values())
def test_lightning_alone_is_not_exact(place: str, tmp_path: Path) -> None:
    """Once this fails Lightning has learned it, and ours may go."""
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "val_check_interval": 3}
    whole = run(Dicey, tmp_path, **options)
    resumed = run(Dicey, tmp_path, tmp_path / f"{place}.ckpt", **options)
    assert any(name.startswith("/state_dict") for name in unlike(whole, resumed))


@pytest.mark.parametrize("failed", [0, 4, NUM_BATCHES - 1])
def test_a_batch_that_failed_is_done_again_with_a_warning(failed: int, tmp_path: Path) -> None:
    class Failing(DiceyLoRA):
        def on_after_backward(self) -> None:
            if self.trainer.current_epoch == 1 and self.trainer.fit_loop.batch_idx == failed:
                raise RuntimeError("out of luck")

    class Keep(Callback):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    with pytest.raises(RuntimeError, match="out of luck"):
        run(Failing, tmp_path, accumulate_grad_batches=3, callbacks=[Keep()])
    with pytest.warns(UserWarning, match="the file was written in the middle of a batch"):
        resumed = run(DiceyLoRA, tmp_path, tmp_path / "failed.ckpt", accumulate_grad_batches=3)
    assert [batch for _, batch, _ in resumed.losses] == [*range(failed, NUM_BATCHES), *range(NUM_BATCHES)]
