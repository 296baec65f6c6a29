"""Moving averages of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import override

from lightning_lora.checkpoints.shards import writes_shards
from lightning_lora.errors import CallbackSettingError, check_arguments
from lightning_lora.lora.patterns import state_dict_name
from lightning_lora.lora.shards import full_tensor, local_shard, reshard
from lightning_lora.trainer_access import found, warn_if_beyond_run


class AdapterEMA(Callback):
    """Exponential moving average of the trained parameters: ``average = decay * average + (1 - decay) * weight``.

    Works as Lightning's ``EMAWeightAveraging``, but without its copy of the whole base: only adapters and fully trained
    modules are averaged, each rank averages its own shard, in float32 or wider. Validation uses the average, the module
    holds it after training, and a checkpoint has the average as ``state_dict`` and the weights to continue from as
    ``current_model_state``. Folders of `AdapterCheckpoint` hold the average too. Buffers are not averaged.

    Args:
        decay: Share of the average that an update keeps, in ``[0, 1)``.
        update_every_n_steps: Optimizer steps between two updates, at least 1.
        update_starting_at_step: Index of the first optimizer step that updates, counted from 0; the average starts with
            the weights after this step. None: the first step of the run.

    Raises:
        ConfigError: If a number is out of range; at the start of ``fit`` under FSDP1 or DeepSpeed, with checkpoints in
            shards or of weights only, or together with another callback that averages weights.
    """

    def __init__(
        self, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int | None = None
    ) -> None:
        check_arguments(AdapterEMA, locals(), CallbackSettingError)
        if not 0 <= decay < 1:
            raise CallbackSettingError(f"decay must be in [0, 1), got {decay!r}.")
        if update_every_n_steps < 1:
            raise CallbackSettingError(f"update_every_n_steps must be at least 1, got {update_every_n_steps!r}.")
        self.decay = decay
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self._forget()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse settings under which weights cannot be averaged, and forget the previous run."""
        if stage == "fit":
            _refuse(trainer)
            self._forget()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the average of a checkpoint to the devices of the weights."""
        if self.update_starting_at_step is not None:
            first = self.update_starting_at_step
            warn_if_beyond_run(trainer, f"AdapterEMA with update_starting_at_step={first}", first + 1)
        for name, parameter in _trained_parameters(pl_module).items():
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
        """Let the module hold the average during validation."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_in(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its trained weights back."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_out(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its trained weights back."""
        self._swap_out(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        self._swap_in(pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the average as ``state_dict``, and the weights as ``current_model_state``."""
        if trainer.state.fn == TrainerFn.FITTING:
            # Another callback may save before this one has updated, and a resumed run would miss the step.
            self._update(trainer, pl_module)
        checkpoint["averaging_state"] = {"step": self._step, "average": {}}
        if not self._average:
            return
        reshard(pl_module)
        current = {name: _whole(p) for name, p in (self._current or _trained_parameters(pl_module)).items()}
        average = {name: _whole(tensor) for name, tensor in self._average.items()}
        checkpoint["averaging_state"]["average"] = average
        if checkpoint["state_dict"]:  # with sharded weights it is empty on all ranks but 0
            checkpoint["current_model_state"] = current
            state = {name: average[name].to(tensor.dtype) for name, tensor in current.items()}
            checkpoint["state_dict"] = checkpoint["state_dict"] | state

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the weights to continue from: those in ``state_dict`` are the average."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "averaging_state" not in checkpoint:
            rank_zero_warn("the checkpoint was written without AdapterEMA: the average starts with its weights.")
            return
        state = checkpoint["averaging_state"]
        if "average" not in state:
            raise CallbackSettingError(
                "the checkpoint's average was not written by AdapterEMA: resume with its own callback."
            )
        self._step, self._loaded = state["step"], state["average"]
        for name, parameter in _trained_parameters(pl_module).items():
            if name in self._loaded:
                _copy_into(parameter, _like(parameter, checkpoint["current_model_state"][name]))

    @override
    def state_dict(self) -> dict[str, Any]:
        """The decay, so that Lightning warns when a run is resumed without this callback."""
        return {"decay": self.decay}

    @contextmanager
    def averaged(self, module: nn.Module) -> Iterator[None]:
        """Let ``module`` hold the average within this context, if there is one yet; all ranks must enter."""
        was_in = self._current is not None
        self._swap_in(module)
        try:
            yield
        finally:
            if not was_in:
                self._swap_out(module)

    def follow_growth(self, module: nn.Module) -> None:
        """Give averages of parameters that have grown their new shape; the average of a new part starts with it.

        Call it between two optimizer steps, outside validation.
        """
        for name, parameter in _trained_parameters(module).items():
            average = self._average.get(name)
            if average is not None and average.shape != parameter.shape:
                self._average[name] = _wide(parameter)
                self._average[name][tuple(slice(0, length) for length in average.shape)] = average

    def _forget(self) -> None:
        self._average: dict[str, Tensor] = {}
        # The trained weights, while the module holds their average.
        self._current: dict[str, Tensor] | None = None
        self._loaded: dict[str, Tensor] = {}
        self._step = 0

    def _update(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step - 1
        is_new = trainer.global_step > self._step and self._current is None and not self._loaded
        last = max(self._step, self.update_starting_at_step or 0) - 1
        # Not by the remainder: with manual optimization one batch can take several optimizer steps.
        if not is_new or step // self.update_every_n_steps <= last // self.update_every_n_steps:
            return
        self._step = trainer.global_step
        reshard(module)
        trained = _trained_parameters(module)
        if not self._average:
            self._average = {name: _wide(parameter) for name, parameter in trained.items()}
            return
        averages = [local_shard(self._average[name]) for name in trained]
        weights = [
            local_shard(p.detach()).to(average.dtype) for p, average in zip(trained.values(), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    def _swap_in(self, module: nn.Module) -> None:
        if not self._average or self._current is not None:
            return
        reshard(module)
        trained = _trained_parameters(module)
        self._current = {name: parameter.detach().clone() for name, parameter in trained.items()}
        for name, parameter in trained.items():
            _copy_into(parameter, self._average[name])

    def _swap_out(self, module: nn.Module) -> None:
        if self._current is None:
            return
        reshard(module)
        for name, parameter in _trained_parameters(module).items():
            _copy_into(parameter, self._current[name])
        self._current = None


def averaged(trainer: Trainer, module: nn.Module) -> AbstractContextManager[None]:
    """A context in which ``module`` holds the average of the trainer's `AdapterEMA`; without one nothing changes."""
    ema = found(trainer, AdapterEMA)
    return nullcontext() if ema is None else ema.averaged(module)


def _refuse(trainer: Trainer) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise CallbackSettingError(
            f"AdapterEMA cannot average the flattened weights of {type(strategy).__name__}: use DDP, or "
            f"ModelParallelStrategy with shard_lora."
        )
    if writes_shards(strategy):
        raise CallbackSettingError(
            "AdapterEMA cannot write its average into checkpoints in shards: give the strategy "
            "save_distributed_checkpoint=False."
        )
    if other := found(trainer, WeightAveraging, StochasticWeightAveraging):
        raise CallbackSettingError(
            f"AdapterEMA and {type(other).__name__} would both average the weights: remove one of them."
        )
    if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
        raise CallbackSettingError(
            "ModelCheckpoint(save_weights_only=True) writes without asking callbacks, so its files would not hold the "
            "average: set it to False."
        )


def _trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters, under every name that they have in a state dict."""
    named = module.named_parameters(remove_duplicate=False)
    return {state_dict_name(name): parameter for name, parameter in named if parameter.requires_grad}


def _wide(tensor: Tensor) -> Tensor:
    # A small share 1 - decay of a weight would be rounded away in bfloat16.
    return tensor.detach().clone().to(torch.promote_types(tensor.dtype, torch.float32))


def _whole(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor on the CPU. For a sharded tensor a collective: all ranks must call."""
    return full_tensor(tensor).to("cpu", copy=True)


def _like(tensor: Tensor, whole: Tensor) -> Tensor:
    """``whole``, equal on all ranks, with the device, dtype and sharding of ``tensor``."""
    moved = whole.to(tensor.device, tensor.dtype)
    if isinstance(tensor, DTensor):
        return distribute_tensor(moved, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return moved.clone()


def _copy_into(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        local_shard(parameter).copy_(local_shard(values))
