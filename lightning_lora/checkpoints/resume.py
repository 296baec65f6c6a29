"""Exact resume: save with a run what Lightning's checkpoints lack, and continue as if it had never stopped.

Every rank saves its random states (`epoch_start`, `random_state`) and the gradients of an open accumulation window
(`window_gradients`). On the way back the position in Lightning's loops is restored (`loop_position`), and samplers skip
the indices already used, without reading rows again (`loader_position`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DistributedSampler

from lightning_lora.checkpoints.epoch_start import EpochStart
from lightning_lora.checkpoints.loop_position import LoopPosition, begin_epoch, current_position, restore_position
from lightning_lora.checkpoints.optimizer_state_names import (
    match_optimizer_order,
    reads_by_name,
    refuse_states_by_position,
)
from lightning_lora.checkpoints.random_state import run_random_state, set_run_random_state
from lightning_lora.checkpoints.window_gradients import is_window_open, restore_window_gradients, window_gradients
from lightning_lora.effective_batch import EffectiveBatch, loader_batch_size
from lightning_lora.lightning_private import attached_trainer, training_loaders
from lightning_lora.sharding.collectives import gather_on_rank_zero

RESUME_KEY = "lightning_lora_resume"
"""The entry of a checkpoint that holds everything for exact resume."""

_FORMAT = 1
_LIGHTNING_DOES_NOT_KNOW = "You're resuming from a checkpoint that ended before the epoch ended"


@dataclass
class RunMemory:
    """State that exact resume keeps between the hooks of a run.

    Attributes:
        epoch: Random states at the start of the present epoch.
        loaded: The entry that `save` wrote to the loaded checkpoint, until `resume` has used it.
        optimizer_states: States in the loaded checkpoint, until the optimizers exist that will load them.
    """

    epoch: EpochStart = field(default_factory=EpochStart)
    loaded: dict[str, Any] | None = None
    optimizer_states: list[dict[str, Any]] | None = None

    def run_starts(self) -> None:
        """Forget what a tuner, or a run that failed, has loaded and not used."""
        self.loaded = self.optimizer_states = None

    def fit_starts(self, module: LightningModule) -> None:
        """Put loaded optimizer states in the order of the optimizers; record the random states of the first epoch."""
        states, self.optimizer_states = self.optimizer_states, None
        # Strategies that read a checkpoint themselves do so later, and use the names.
        if states is not None and not reads_by_name(module.trainer.strategy):
            match_optimizer_order(module, states)
        self.epoch.record_fit_start(module.trainer)

    def epoch_starts(self, trainer: Trainer) -> None:
        """Record the random states before the first batch of an epoch."""
        self.epoch.record_epoch_start(trainer)
        begin_epoch(trainer)

    def save(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the entry for exact resume; files of weights only, or written outside ``fit``, get none."""
        trainer = module.trainer
        if trainer.state.fn != TrainerFn.FITTING or "optimizer_states" not in checkpoint:
            return
        own = {
            "random": run_random_state(trainer),
            "before_iterators": self.epoch.before_iterators,
            "before_first_batch": self.epoch.before_first_batch,
            "gradients": window_gradients(module),
        }
        checkpoint[RESUME_KEY] = {
            "format": _FORMAT,
            "position": current_position(trainer).to_dict(),
            "is_first_epoch": self.epoch.num_begun <= 1,
            "batch": list(astuple(EffectiveBatch.of(trainer))) if loader_batch_size(trainer.train_dataloader) else None,
            "is_window_open": is_window_open(trainer),
            "order_seeds": _order_seeds(trainer),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "ranks": gather_on_rank_zero(own),
        }

    def load(self, module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Keep optimizer states, and the entry for `resume`; a file without it is resumed as Lightning does."""
        trainer = attached_trainer(module)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            refuse_states_by_position(module, checkpoint)
            self.optimizer_states = checkpoint.get("optimizer_states")
        loaded = checkpoint.get(RESUME_KEY)
        if loaded is not None and loaded["format"] > _FORMAT:
            rank_zero_warn(
                f"this checkpoint's resume format {loaded['format']} is newer than {_FORMAT}: the run does not go on "
                "exactly as it would have; update lightning-lora."
            )
            loaded = None
        self.loaded = loaded

    def resume(self, module: LightningModule) -> None:
        """Continue where the loaded checkpoint was written; call it last before training."""
        loaded, self.loaded, trainer = self.loaded, None, module.trainer
        if loaded is None or not trainer.fit_loop.is_resuming:
            return
        position, own, reasons = _continuation(loaded, trainer)
        restore_position(trainer, position, loaded["metrics"])
        if position.is_epoch_over:
            # The iterators of the next epoch are made at the same point as in every epoch but the first.
            self.epoch.num_begun = min(position.num_epochs, 1)
        else:
            num_begun = 1 if loaded["is_first_epoch"] else 2
            self.epoch = EpochStart(own.get("before_iterators"), own.get("before_first_batch"), num_begun)
            reasons += self.epoch.remake_iterators(trainer, position.num_epochs, position.num_batches)
        if own:
            restore_window_gradients(module, own["gradients"])
            set_run_random_state(own["random"], trainer)
        if reasons:
            rank_zero_warn(f"this run goes on, but not exactly as it would have: {'; '.join(reasons)}.")
        else:
            warnings.filterwarnings("ignore", message=_LIGHTNING_DOES_NOT_KNOW)


def _continuation(loaded: Mapping[str, Any], trainer: Trainer) -> tuple[LoopPosition, dict[str, Any], list[str]]:
    """Position to continue from, what this rank saved there, and the reasons why the run is not exact.

    On another number of ranks, or with other batches, the run continues after as many rows. No rank then uses what
    another one saved.
    """
    position = LoopPosition.from_dict(loaded["position"])
    reasons = [] if position.is_between_batches else ["the file was written in the middle of a batch"]
    seeds, seeds_now = loaded.get("order_seeds"), _order_seeds(trainer)
    if seeds is not None and seeds != seeds_now:
        reasons.append(f"the order of its rows came from the seeds {seeds}, and now from {seeds_now}")
    num_ranks, now = len(loaded["ranks"]), EffectiveBatch.of(trainer)
    # A loader without a known batch size counts as one with the rows of the present one.
    before = replace(now, num_ranks=num_ranks) if loaded["batch"] is None else EffectiveBatch(*loaded["batch"])
    if not loader_batch_size(trainer.train_dataloader):
        now = replace(now, micro_batch=before.micro_batch)
    if num_ranks != trainer.world_size:
        how = f"{num_ranks} ranks and is read by {trainer.world_size}"
    elif before.micro_batch != now.micro_batch:
        how = f"batches of {before.micro_batch} rows and now has batches of {now.micro_batch}"
    else:
        return position, loaded["ranks"][trainer.global_rank], reasons
    reasons.append(
        f"the file was written by {how}: random numbers start anew, and an open accumulation window begins anew"
    )
    return _after_the_same_rows(position, before, now, loaded["is_window_open"]), {}, reasons


def _order_seeds(trainer: Trainer) -> list[int]:
    """Seeds of the samplers that draw from no random state: of data modules here, and of Lightning for several ranks.

    Lightning takes the seed of ``seed_everything``, or 0.
    """
    samplers = (getattr(loader, "sampler", None) for loader in training_loaders(trainer))
    # One of another class, such as that of a stream, may have neither.
    shuffling = [each for each in samplers if isinstance(each, DistributedSampler) and getattr(each, "shuffle", False)]
    return [sampler.seed for sampler in shuffling if hasattr(sampler, "seed")]


def _after_the_same_rows(
    position: LoopPosition, before: EffectiveBatch, now: EffectiveBatch, is_window_open: bool
) -> LoopPosition:
    """Position with batches of ``now`` after the rows of the last optimizer step.

    Batches of an open accumulation window are repeated, because other ranks cannot use its gradients.
    """
    num_batches = position.num_batches
    if is_window_open:
        num_batches -= num_batches % before.accumulation
        position = replace(position, is_batch_open=False, is_validated=False)
    rows = num_batches * before.micro_batch * before.num_ranks
    return replace(position, num_batches=rows // (now.micro_batch * now.num_ranks))
