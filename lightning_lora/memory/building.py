"""A LightningModule built without memory for its weights, as a run would build it."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily

from lightning_lora.lora.functional.seeded_dropout import forget_mask
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.memory.failures import explained
from lightning_lora.memory.step_mode import StepMode

_building: ContextVar[bool] = ContextVar("lightning_lora_building_without_memory", default=False)
_PLAIN = (Tensor, nn.Parameter)
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric",
    "lightning.pytorch",
)


def builds_without_memory() -> bool:
    """Whether a module is being built for a trace: ``configure_model`` must not read weights then."""
    return _building.get()


class StandInTrainer(Trainer):
    """A trainer of one CPU that a traced module can ask for its settings; it runs nothing."""

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Some number of steps: schedules change no memory."""
        return 1_000_000


@contextlib.contextmanager
def built_without_memory(
    module: LightningModule, *, precision: Any = "32-true", accumulate_grad_batches: int = 1
) -> Iterator[LightningModule]:
    """Give a copy of ``module``, built and adapted, whose weights have shapes and types and no values.

    ``configure_model`` is called on the copy; a task of this package does not read its weights. The module itself, the
    random generators and the modules that others hold are left as they are. The copy is good within the context only.

    Args:
        module: Any LightningModule; built or not, adapted or not.
        precision: The precision of the Trainer, which may decide the type of the weights.
        accumulate_grad_batches: Micro-batches of an optimizer step, for modules that ask their trainer.
    """
    built = WithoutMemory(module, precision, accumulate_grad_batches)
    with built.entered():
        yield built.module


class WithoutMemory:
    """A copy of a module whose weights have no values, and the mode that runs it.

    Args:
        module: Any LightningModule, as `built_without_memory` takes it.
        precision: The precision of the Trainer.
        accumulate_grad_batches: Micro-batches of an optimizer step.

    Attributes:
        module: The copy, built and adapted.
        mode: What its operations run in.
        trainer: The trainer that the copy believes to have.
    """

    def __init__(self, module: LightningModule, precision: Any = "32-true", accumulate_grad_batches: int = 1) -> None:
        self.mode = StepMode()
        with _for_a_trace():
            self.trainer = _stand_in(precision, accumulate_grad_batches)
            self.module = fake_copy(module, self.mode.fake)
            self.module.trainer = self.trainer
            self.trainer.strategy.connect(self.module)
            with self.mode.entered():
                plugin = self.trainer.precision_plugin
                initial = self.trainer.strategy.tensor_init_context(), plugin.module_init_context()
                # Initialisers such as trunc_normal_ draw again while any value is out of bounds.
                self.mode.truth = False
                with self.explained("building"), initial[0], initial[1]:
                    self.module.configure_model()
                self.mode.truth = True
                _convert(self.module, plugin)

    def explained(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Within the context a failure names the part of the module and the operation."""
        self.mode.running.clear()
        return explained(self.module, doing, self.mode.running)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Within the context the copy can run, and nothing outside of it changes."""
        with _for_a_trace(), self.mode.entered():
            yield


@contextlib.contextmanager
def _for_a_trace() -> Iterator[None]:
    token = _building.set(True)
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        _building.reset(token)
        forget_mask()


def _convert(module: LightningModule, plugin: Any) -> None:
    """Convert the types of a module as the plugin does; adapters stay as wide as `LoRAMixin` keeps them."""
    with unset_fake_temporarily():
        dtype = plugin.convert_module(nn.Linear(1, 1, dtype=torch.float32)).weight.dtype
    if dtype is torch.float32:
        return
    # Module.to would swap tensors, which fails for fake ones that something refers to.
    factors = {id(factor) for factor in factor_parameters(module).values()}
    converted: dict[int, Tensor] = {}
    for owner in module.modules():
        places: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for held in places:
            for name, tensor in held.items():
                if tensor is None or not tensor.is_floating_point() or tensor.dtype is dtype:
                    continue
                if id(tensor) in factors and torch.promote_types(tensor.dtype, dtype) is not dtype:
                    continue
                if id(tensor) not in converted:
                    new = tensor.detach().to(dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    converted[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                held[name] = converted[id(tensor)]


def _stand_in(precision: Any, accumulate_grad_batches: int) -> Trainer:
    trainer = StandInTrainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        accumulate_grad_batches=accumulate_grad_batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=1,
    )
    trainer.state.fn = TrainerFn.FITTING
    trainer.training = True
    return trainer


def fake_copy(module: LightningModule, mode: FakeTensorMode) -> LightningModule:
    """A copy of ``module`` without values, and without its trainer."""
    memo: dict[int, Any] = {id(owner): None for owner in trainers_of(module)}
    for parameter in module.parameters():
        if type(parameter) not in _PLAIN and not hasattr(type(parameter), "__tensor_flatten__"):
            memo[id(parameter)] = _without_values(parameter, mode)
    with FakeCopyMode(mode):
        return copy.deepcopy(module, memo)


def trainers_of(module: LightningModule) -> Iterator[Any]:
    """The trainers that ``module`` and its children refer to, which a copy of it must not copy."""
    for child in module.modules():
        for name in ("_trainer", "_fabric"):
            owner = child.__dict__.get(name)
            if owner is not None:
                yield owner


def _without_values(value: Any, mode: FakeTensorMode) -> Any:
    """``value`` with fake tensors for its tensors: a quantised weight with its scales, or what holds them."""
    if isinstance(value, Tensor):
        made: Any = mode.from_tensor(value.detach().as_subclass(Tensor), static_shapes=True)
        if isinstance(value, nn.Parameter):
            made._is_param = True
            for name, held in value.__dict__.items():
                if name not in ("data", "module"):
                    setattr(made, name, _without_values(held, mode))
        return made
    if type(value).__module__.startswith("bitsandbytes."):
        made = copy.copy(value)
        for name, held in vars(value).items():
            setattr(made, name, _without_values(held, mode))
        return made
    return value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is said about a run that does not take place."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
