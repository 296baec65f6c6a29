"""Averages of what is trained, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import override

from lightning_lora.checkpoints.shards import writes_shards
from lightning_lora.errors import ConfigError
from lightning_lora.lora.shards import local_part, reshard, whole_tensor


class AdapterEMA(Callback):
    r"""Exponential moving average of the trained parameters: ``average = decay * average + (1 - decay) * weight``.

    What Lightning's ``EMAWeightAveraging`` does, without its copy of the whole base: of adapters and fully trained
    modules only, each rank of its own shard, in float32 or wider. As there, validation is of the average, the module
    holds it when training has ended, and a checkpoint's ``state_dict`` is the average while ``current_model_state``
    goes on training. Folders of `AdapterCheckpoint` hold the average too. Buffers are not averaged.

    Args:
        decay: Share of the average that a step keeps, 0 or more and below 1.
        update_every_n_steps: Optimizer steps from one update to the next.
        update_starting_at_step: The first optimizer step that may update, counted from 0; the average starts as the
            weights after it. None: the first.

    Raises:
        ConfigError: If a number is out of its range; at the start of ``fit`` with FSDP1, DeepSpeed, checkpoints in
            shards or of weights only, or beside another callback that averages.
    """

    def __init__(
        self, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"decay must be 0 or more and below 1, got {decay!r}.")
        if update_every_n_steps < 1:
            raise ConfigError(f"update_every_n_steps must be 1 or more, got {update_every_n_steps!r}.")
        self.decay = decay
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self._forget()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be averaged, and forget the run before."""
        if stage == "fit":
            _refuse(trainer)
            self._forget()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the average of a checkpoint to where the weights are now."""
        for name, parameter in _trained(pl_module).items():
            if name in self._loaded:
                self._average[name] = _like(_wide(parameter), self._loaded[name])
        self._loaded = {}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after an optimizer step."""
        self._update(trainer, pl_module)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_in(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on training where training was."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_out(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the weights that were trained."""
        self._swap_out(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        self._swap_in(pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the average as the weights, and the weights beside it."""
        if trainer.state.fn == TrainerFn.FITTING:
            # Another callback may save before our turn has come, and the step is not seen again after a resume.
            self._update(trainer, pl_module)
        checkpoint["averaging_state"] = {"step": self._step, "average": {}}
        if not self._average:
            return
        reshard(pl_module)
        current = {name: _whole(p) for name, p in (self._current or _trained(pl_module)).items()}
        average = {name: _whole(tensor) for name, tensor in self._average.items()}
        checkpoint["averaging_state"]["average"] = average
        if checkpoint["state_dict"]:  # of sharded weights only rank 0 has one
            checkpoint["current_model_state"] = current
            state = {name: average[name].to(tensor.dtype) for name, tensor in current.items()}
            checkpoint["state_dict"] = checkpoint["state_dict"] | state

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the weights back that go on training: those of ``state_dict`` are the average."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "averaging_state" not in checkpoint:
            rank_zero_warn("the checkpoint was written without AdapterEMA: averaging begins with its weights.")
            return
        state = checkpoint["averaging_state"]
        if "average" not in state:
            raise ConfigError("the checkpoint's average is not of AdapterEMA: go on with the callback that wrote it.")
        self._step, self._loaded = state["step"], state["average"]
        for name, parameter in _trained(pl_module).items():
            if name in self._loaded:
                _put(parameter, _like(parameter, checkpoint["current_model_state"][name]))

    @override
    def state_dict(self) -> dict[str, Any]:
        """A note in the checkpoint, by which Lightning warns where a run goes on without this callback."""
        return {"decay": self.decay}

    @contextmanager
    def averaged(self, module: nn.Module) -> Iterator[None]:
        """Let ``module`` hold the average within this context, if there is one yet. All ranks must enter."""
        was_in = self._current is not None
        self._swap_in(module)
        try:
            yield
        finally:
            if not was_in:
                self._swap_out(module)

    def _forget(self) -> None:
        self._average: dict[str, Tensor] = {}
        # The weights that are trained, while the module holds their average.
        self._current: dict[str, Tensor] | None = None
        self._loaded: dict[str, Tensor] = {}
        self._step = 0

    def _update(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step - 1
        is_new = trainer.global_step > self._step and self._current is None and not self._loaded
        if not is_new or step % self.update_every_n_steps or step < (self.update_starting_at_step or 0):
            return
        self._step = trainer.global_step
        reshard(module)
        trained = _trained(module)
        if not self._average:
            self._average = {name: _wide(parameter) for name, parameter in trained.items()}
            return
        averages = [local_part(self._average[name]) for name in trained]
        weights = [
            local_part(p.detach()).to(average.dtype) for p, average in zip(trained.values(), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    def _swap_in(self, module: nn.Module) -> None:
        if not self._average or self._current is not None:
            return
        reshard(module)
        trained = _trained(module)
        self._current = {name: parameter.detach().clone() for name, parameter in trained.items()}
        for name, parameter in trained.items():
            _put(parameter, self._average[name])

    def _swap_out(self, module: nn.Module) -> None:
        if self._current is None:
            return
        reshard(module)
        for name, parameter in _trained(module).items():
            _put(parameter, self._current[name])
        self._current = None


@contextmanager
def averaged(trainer: Trainer, module: nn.Module) -> Iterator[None]:
    """Let ``module`` hold the average of the trainer's `AdapterEMA` within this context; nothing without one."""
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    found = [callback for callback in callbacks if isinstance(callback, AdapterEMA)]
    if not found:
        yield
        return
    with found[0].averaged(module):
        yield


def _refuse(trainer: Trainer) -> None:
    strategy, callbacks = trainer.strategy, trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ConfigError(
            f"AdapterEMA cannot average the flattened weights of {type(strategy).__name__}: use DDP, or "
            f"ModelParallelStrategy with shard_lora."
        )
    if writes_shards(strategy):
        raise ConfigError(
            "AdapterEMA keeps the average in whole checkpoints only: give the strategy "
            "save_distributed_checkpoint=False."
        )
    for callback in callbacks:
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise ConfigError(f"AdapterEMA and {type(callback).__name__} would both average the weights: drop one.")
        if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
            raise ConfigError(
                "ModelCheckpoint(save_weights_only=True) asks no callback and would write the weights that are not "
                "averaged: leave it false."
            )


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, under every name that a state dict has for it."""
    return {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}


def _wide(tensor: Tensor) -> Tensor:
    # Of a step 1 - decay little is left in bfloat16.
    return tensor.detach().clone().to(torch.promote_types(tensor.dtype, torch.float32))


def _whole(tensor: Tensor) -> Tensor:
    """A copy in memory of its own; of a sharded tensor all ranks must ask."""
    return whole_tensor(tensor).to("cpu", copy=True)


def _like(tensor: Tensor, whole: Tensor) -> Tensor:
    """``whole``, which every rank has, sharded and placed as ``tensor``."""
    moved = whole.to(tensor.device, tensor.dtype)
    if isinstance(tensor, DTensor):
        return distribute_tensor(moved, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return moved.clone()


def _put(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        local_part(parameter).copy_(local_part(values))
