"""The start of the present epoch: from which random numbers its data were drawn, and how to draw them again.

A shuffled order follows from the random state in which Lightning makes the iterators of an epoch. That state is saved.
A resumed run restores it, makes the iterators again and skips the batches that were trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from torch.utils.data import DataLoader

from lightning_lora.checkpoints.loader_position import generators, keeps_position, obstacle, starting_after
from lightning_lora.checkpoints.random_state import run_random_state, set_run_random_state
from lightning_lora.lightning_private import training_fetcher, training_loaders


@dataclass
class EpochStart:
    """Random states at the start of the present epoch.

    Attributes:
        before_iterators: State before the iterators of this epoch were made; None if unknown.
        before_first_batch: State before the first batch of this epoch was fetched; None if unknown.
        num_begun: Epochs begun in this process. Lightning makes the iterators of the first one before all its hooks.
    """

    before_iterators: dict[str, Any] | None = None
    before_first_batch: dict[str, Any] | None = None
    num_begun: int = 0

    def record_fit_start(self, trainer: Trainer) -> None:
        """Record the state before the iterators of the first epoch; call it in the last hook before they are made.

        ``trainer.estimated_stepping_batches``, used while optimizers are set up, makes them earlier. Workers have then
        drawn their order from an unknown state, and the iterators are made again here. Without workers nothing is
        drawn before the first batch.
        """
        self.num_begun = 0
        has_workers = any(getattr(loader, "num_workers", 0) for loader in training_loaders(trainer))
        early = training_fetcher(trainer) if has_workers else None
        if early is not None:
            early.combined_loader.reset()
        self.before_iterators = run_random_state(trainer)
        if early is not None:
            iter(early)

    def record_epoch_start(self, trainer: Trainer) -> None:
        """Record the state before the first batch, and before the iterators of every epoch but the first."""
        self.num_begun += 1
        self.before_first_batch = run_random_state(trainer)
        if self.num_begun > 1:
            self.before_iterators = self.before_first_batch

    def remake_iterators(self, trainer: Trainer, num_epochs: int, num_batches: int) -> list[str]:
        """Make the iterators of the recorded epoch again, after its first ``num_batches`` batches.

        Returns:
            Reasons why the data do not continue exactly; empty if they do.
        """
        loaders, fetcher = training_loaders(trainer), training_fetcher(trainer)
        assert fetcher is not None
        if any(map(keeps_position, loaders)):
            return _restore_kept_positions(trainer, fetcher)
        if reasons := [reason for loader in loaders if (reason := obstacle(loader, num_batches)) is not None]:
            return list(dict.fromkeys(reasons))
        for loader in loaders:
            # Lightning sets it too, but after workers that read ahead have begun.
            _set_sampler_epoch(loader, num_epochs)
        is_first = self.num_begun == 1
        if self.before_iterators is not None:
            set_run_random_state(self.before_iterators, trainer)
            if is_first:
                # Persistent workers are seeded once, when the first iterator is made.
                fetcher.combined_loader.reset()
        with starting_after(num_batches, loaders) as skip_now:
            iter(fetcher)
            if is_first and self.before_first_batch is not None:
                reasons = self._check_generators(loaders)
                # The hooks of the epoch's start ran between making the iterators and fetching the first batch.
                set_run_random_state(self.before_first_batch, trainer)
            skip_now()
        return reasons

    def _check_generators(self, loaders: Sequence[DataLoader[Any]]) -> list[str]:
        """Compare generators of loaders whose workers have read ahead with their state in the first epoch."""
        assert self.before_first_batch is not None
        expected = self.before_first_batch["own"]
        now = [generator.get_state() for generator in generators(loaders)]
        is_same = len(now) == len(expected) and all(map(torch.equal, now, expected))
        if is_same or not any(loader.num_workers for loader in loaders):
            return []
        return ["the generator of a loader with workers had been drawn from before the first epoch"]


def _restore_kept_positions(trainer: Trainer, fetcher: _DataFetcher) -> list[str]:
    """Load the positions that loaders have saved themselves; returns reasons as `EpochStart.remake_iterators` does."""
    combined = fetcher.combined_loader
    if states := trainer.fit_loop._combined_loader_states_to_load:
        # Lightning loads them into the first iterators only, which `estimated_stepping_batches` has used up.
        combined.reset()
        combined._load_state_dicts(states)
        iter(fetcher)
    others = [type(loader).__name__ for loader in combined.flattened if not keeps_position(loader)]
    reasons = [f"a {name} beside a loader that keeps its position starts from its beginning" for name in others]
    if fetcher.length is None:
        reasons.append("Lightning reads ahead of a loader without a length, and a batch is skipped")
    return reasons
