"""Exact resume: what Lightning's checkpoints lack to go on as if nothing had happened.

Saved for every rank: the random generators now and where the epoch began, and the gradients of an accumulation window
that is still open. On the way back the samplers pass over the indices that were used up, without reading rows again,
and Lightning's loops are put where the file was written (`lightning_lora.checkpoints.loop_position`).

The gradients of an open window are kept rather than the window replayed from its start: buffers, metrics and callbacks
have seen its batches already and would see them twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_lora.checkpoints.loader_position import generators, keeps_position, obstacle, starting_at
from lightning_lora.checkpoints.loop_position import Point, begin_epoch, go_to, position
from lightning_lora.checkpoints.random_state import random_state, set_random_state
from lightning_lora.effective_batch import EffectiveBatch, loader_batch_size
from lightning_lora.lora.shards import local_shard
from lightning_lora.sharding.collectives import of_every_rank

KEY = "lightning_lora_resume"
FORMAT = 1
_LIGHTNING_DOES_NOT_KNOW = "You're resuming from a checkpoint that ended before the epoch ended"


@dataclass
class RunMemory:
    """What a run remembers between its hooks.

    Attributes:
        before_iterators: State of the generators before the iterators of this epoch were made.
        before_first_batch: The same before its first batch was fetched.
        num_epochs: Epochs begun in this process: the iterators of the first one are made before any hook.
        loaded: What `save` wrote, until `go_on` has used it.
    """

    before_iterators: dict[str, Any] | None = None
    before_first_batch: dict[str, Any] | None = None
    num_epochs: int = 0
    loaded: dict[str, Any] | None = None

    def fit_starts(self, trainer: Trainer) -> None:
        """The last hook before Lightning makes the first iterators, unless the optimizers' setup asked for steps."""
        self.num_epochs = 0
        remade = _with_workers(trainer)
        if remade is not None:
            # Their workers have drawn their order already, from numbers that nobody can know any more. Without workers
            # nothing is drawn before the first batch.
            remade.combined_loader.reset()
        self.before_iterators = _random_state(trainer)
        if remade is not None:
            iter(remade)

    def epoch_starts(self, trainer: Trainer) -> None:
        """The last hook before the later iterators, and before the first batch of every epoch."""
        self.num_epochs += 1
        self.before_first_batch = _random_state(trainer)
        if self.num_epochs > 1:
            self.before_iterators = self.before_first_batch
        begin_epoch(trainer)

    def save(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to go on from here; nothing to files of weights only, or outside ``fit``."""
        trainer = module.trainer
        if trainer.state.fn != TrainerFn.FITTING or "optimizer_states" not in checkpoint:
            return
        own = {
            "random": _random_state(trainer),
            "before_iterators": self.before_iterators,
            "before_first_batch": self.before_first_batch,
            "gradients": _open_window(module),
        }
        checkpoint[KEY] = {
            "format": FORMAT,
            "position": position(trainer).to_dict(),
            "is_first_epoch": self.num_epochs <= 1,
            "batch": list(astuple(EffectiveBatch.of(trainer))) if loader_batch_size(trainer.train_dataloader) else None,
            "is_window_open": _is_window_open(trainer),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "ranks": of_every_rank(own),
        }

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep what `save` wrote for `go_on`; a file without it is resumed as Lightning does."""
        loaded = checkpoint.get(KEY)
        if loaded is not None and loaded["format"] > FORMAT:
            rank_zero_warn(
                f"this checkpoint's resume format {loaded['format']} is newer than {FORMAT}: the run does not go on "
                "exactly as it would have; update lightning-lora."
            )
            loaded = None
        self.loaded = loaded

    def go_on(self, module: LightningModule) -> None:
        """Continue where the checkpoint was written; the last thing before training."""
        loaded, self.loaded, trainer = self.loaded, None, module.trainer
        if loaded is None or not trainer.fit_loop.is_resuming:
            return
        point, own = Point.from_dict(loaded["position"]), {}
        saved, now = len(loaded["ranks"]), EffectiveBatch.of(trainer)
        # A loader that did not say its rows is taken to have had as many as the present one.
        before = replace(now, num_ranks=saved) if loaded["batch"] is None else EffectiveBatch(*loaded["batch"])
        if not loader_batch_size(trainer.train_dataloader):
            now = replace(now, micro_batch=before.micro_batch)
        reasons = [] if point.is_between_batches else ["the file was written in the middle of a batch"]
        if saved == trainer.world_size and before.micro_batch == now.micro_batch:
            own = loaded["ranks"][trainer.global_rank]
        else:
            point = _behind_the_same_rows(point, before, now, loaded["is_window_open"])
            how = f"{saved} ranks and is read by {trainer.world_size}"
            if saved == trainer.world_size:
                how = f"batches of {before.micro_batch} rows and now has batches of {now.micro_batch}"
            reasons.append(
                f"the file was written by {how}: random numbers start anew, and an open accumulation window begins anew"
            )
        # A plateau scheduler may be due first and asks for these.
        known = trainer._logger_connector._callback_metrics
        device = trainer.strategy.root_device
        known.update({name: torch.tensor(value, device=device) for name, value in loaded["metrics"].items()})
        go_to(trainer, point)
        if point.is_epoch_over:
            # The iterators of the next epoch are made in the order of every epoch but the first.
            self.num_epochs = min(point.num_epochs, 1)
        else:
            self.before_iterators, self.before_first_batch = own.get("before_iterators"), own.get("before_first_batch")
            self.num_epochs = 1 if loaded["is_first_epoch"] else 2
            reasons += self._place_loaders(trainer, point.num_epochs, point.num_batches)
        if own:
            _put_window(module, own["gradients"])
            _set_random_state(own["random"], trainer)
        if reasons:
            rank_zero_warn(f"this run goes on, but not exactly as it would have: {'; '.join(reasons)}.")
        else:
            warnings.filterwarnings("ignore", message=_LIGHTNING_DOES_NOT_KNOW)

    def _place_loaders(self, trainer: Trainer, num_epochs: int, num_batches: int) -> list[str]:
        """Make the iterators of the epoch again, behind the batches that were trained on; what stands in the way."""
        combined, fetcher = trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher
        assert combined is not None
        assert fetcher is not None
        if any(map(keeps_position, combined.flattened)):
            if states := trainer.fit_loop._combined_loader_states_to_load:
                # Lightning loads them with the first iterators, which `estimated_stepping_batches` has it make too
                # early.
                combined.reset()
                combined._load_state_dicts(states)
                iter(fetcher)
            plain = [type(loader).__name__ for loader in combined.flattened if not keeps_position(loader)]
            reasons = [f"a {name} beside a loader that keeps its position starts from its beginning" for name in plain]
            if fetcher.length is None:
                reasons.append("Lightning reads ahead of a loader without a length, and a batch is passed over")
            return reasons
        reasons = [reason for loader in combined.flattened if (reason := obstacle(loader, num_batches)) is not None]
        if reasons:
            return list(dict.fromkeys(reasons))
        for loader in combined.flattened:
            # Lightning says so too late for workers that read ahead.
            _set_sampler_epoch(loader, num_epochs)
        is_first_epoch, began = self.num_epochs == 1, self.before_iterators
        if began is not None:
            _set_random_state(began, trainer)
            if is_first_epoch:
                # Workers that persist are seeded once, when the first iterator is made.
                combined.reset()
        with starting_at(combined.flattened, num_batches) as start:
            iter(fetcher)
            if is_first_epoch and self.before_first_batch is not None:
                reasons = self._check_workers(combined.flattened)
                # Between iterator and first batch came the hooks of the epoch's start.
                _set_random_state(self.before_first_batch, trainer)
            start()
        return reasons

    def _check_workers(self, loaders: Sequence[DataLoader[Any]]) -> list[str]:
        """Whether generators of loaders whose workers have read ahead are where they were in the first epoch."""
        assert self.before_first_batch is not None
        expected = self.before_first_batch["own"]
        now = [generator.get_state() for generator in generators(loaders)]
        is_same = len(now) == len(expected) and all(map(torch.equal, now, expected))
        if is_same or not any(loader.num_workers for loader in loaders):
            return []
        return ["the generator of a loader with workers had been drawn from before the first epoch"]


def _with_workers(trainer: Trainer) -> _DataFetcher | None:
    """What fetches the batches if it has iterators with workers: `estimated_stepping_batches` makes them early."""
    combined = trainer.fit_loop._combined_loader
    if combined is None or not any(getattr(loader, "num_workers", 0) for loader in combined.flattened):
        return None
    return trainer.fit_loop._data_fetcher


def _random_state(trainer: Trainer) -> dict[str, Any]:
    return random_state(trainer.strategy.root_device, _loader_generators(trainer))


def _set_random_state(state: dict[str, Any], trainer: Trainer) -> None:
    set_random_state(state, trainer.strategy.root_device, _loader_generators(trainer))


def _loader_generators(trainer: Trainer) -> list[torch.Generator]:
    combined = trainer.fit_loop._combined_loader
    return generators(combined.flattened if combined is not None else ())


def _is_window_open(trainer: Trainer) -> bool:
    return trainer.fit_loop._should_accumulate() or not position(trainer).is_between_batches


def _behind_the_same_rows(point: Point, before: EffectiveBatch, now: EffectiveBatch, is_window_open: bool) -> Point:
    """Where rows have led to a step; those of an open window, whose gradients other ranks cannot take, come again."""
    num_batches = point.num_batches
    if is_window_open:
        num_batches -= num_batches % before.accumulation
        point = replace(point, is_batch_open=False, is_validated=False)
    rows = num_batches * before.micro_batch * before.num_ranks
    return replace(point, num_batches=rows // (now.micro_batch * now.num_ranks))


def _open_window(module: LightningModule) -> dict[str, Tensor]:
    """Gradients that the next batch will be added to, this rank's part of each."""
    # A module that steps by itself may add to its gradients whenever it likes.
    if module.automatic_optimization and not _is_window_open(module.trainer):
        return {}
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: local_shard(g).detach().to("cpu", copy=True) for name, g in gradients.items()}


def _put_window(module: LightningModule, gradients: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name not in gradients:
            continue
        gradient = gradients[name].to(parameter.device, copy=True)
        if isinstance(parameter, DTensor):
            shape, stride = parameter.shape, parameter.stride()
            mesh, places = parameter.device_mesh, parameter.placements
            parameter.grad = DTensor.from_local(gradient, mesh, places, shape=shape, stride=stride)
        else:
            parameter.grad = gradient
