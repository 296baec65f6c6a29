"""A run that was interrupted at any place continues as if nothing had happened: its last checkpoint is bit-equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig
from lightning_lora.callbacks import LoRA
from tests.support import resuming, toys
from tests.support.resuming import NUM_BATCHES, Dicey, DiceyFull, DiceyLoRA, check_exact, run, unlike

pytestmark = [*toys.expected_warnings, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")]

BATCHES = [f"batch-{epoch}-{batch}" for epoch in (0, 1) for batch in range(1, NUM_BATCHES + 1)]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("make", [DiceyLoRA, DiceyFull])
def test_after_every_batch(make: Callable[[], LightningModule], accumulate: int, tmp_path: Path) -> None:
    check_exact(make, tmp_path, BATCHES, accumulate_grad_batches=accumulate, val_check_interval=3)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("interval", [1.0, 3, 5])
def test_around_validation_and_the_end_of_an_epoch(accumulate: int, interval: float, tmp_path: Path) -> None:
    last = NUM_BATCHES if interval == 1.0 else int(interval)
    places = ["batch-0-7", "batch-1-7", "epoch-0", "epoch-1", f"validation-0-{last}", f"validation-1-{last}"]
    check_exact(DiceyLoRA, tmp_path, places, accumulate_grad_batches=accumulate, val_check_interval=interval)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_a_number_of_steps(accumulate: int, tmp_path: Path) -> None:
    limit = {"max_epochs": -1, "max_steps": 18 if accumulate == 1 else 8}
    places = ["batch-0-4", "batch-0-7", "batch-1-1", "batch-1-7", "epoch-0", "epoch-1", "validation-1-3"]
    check_exact(DiceyLoRA, tmp_path, places, accumulate_grad_batches=accumulate, val_check_interval=3, **limit)


def test_without_validation(tmp_path: Path) -> None:
    class Unwatched(DiceyLoRA):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)

    places = ["batch-0-4", "batch-0-7", "batch-1-7", "epoch-0"]
    check_exact(Unwatched, tmp_path, places, is_validated=False, accumulate_grad_batches=3)


def test_a_run_that_was_stopped_within_an_epoch_is_prolonged(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": -1, "val_check_interval": 3}
    whole = run(DiceyLoRA, tmp_path, max_steps=12, **options)
    run(DiceyLoRA, tmp_path / "half", max_steps=5, **options)
    resumed = run(DiceyLoRA, tmp_path, tmp_path / "half" / "end" / "end.ckpt", max_steps=12, **options)
    assert not unlike(whole, resumed)


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
    check_exact(
        make, tmp_path, places, loader=loader, is_validated=False, max_epochs=2, accumulate_grad_batches=accumulate
    )


class Foreign(Dicey):
    """Its optimizer is built after `configure_model`, when the callback has put adapters in."""


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
