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
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode

from lightning_lora.lightning_messages import messages_from
from lightning_lora.lora.functional.seeded_dropout import forget_mask
from lightning_lora.lora.targets.roles import hugging_face_models
from lightning_lora.memory.failures import explained
from lightning_lora.memory.step_mode import StepMode

_building: ContextVar[bool] = ContextVar("lightning_lora_building_without_memory", default=False)
_PLAIN = (Tensor, nn.Parameter)


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
def built_without_memory(module: LightningModule, *, precision: Any = "32-true") -> Iterator[LightningModule]:
    """Give a copy of ``module``, built and adapted, whose weights have shapes and types and no values.

    ``configure_model`` is called on the copy; a task of this package does not read its weights. The module itself, the
    random generators and the modules that others hold are left as they are. The copy is good within the context only.

    Args:
        module: Any LightningModule; built or not, adapted or not.
    """
    built = WithoutMemory(module, precision)
    with built.entered():
        yield built.module


class WithoutMemory:
    """A copy of a module whose weights have no values, and the mode that runs it.

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
            _count_attention(self.module)
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
                plugin.convert_module(self.module)

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
def _types_can_change() -> Iterator[None]:
    """Let ``module.to(dtype)`` work: torch swaps fake tensors then, and refuses if anything refers to one weakly."""
    swap = torch.utils.swap_tensors

    def take_over(one: Tensor, other: Tensor) -> None:
        if isinstance(one, FakeTensor):
            one.data = other.detach()
        else:
            swap(one, other)

    torch.utils.swap_tensors = take_over
    try:
        yield
    finally:
        torch.utils.swap_tensors = swap


@contextlib.contextmanager
def _for_a_trace() -> Iterator[None]:
    token = _building.set(True)
    try:
        with _quiet(), _types_can_change(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        _building.reset(token)
        forget_mask()


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
    """A copy of ``module`` on a CPU, without values and without its trainer."""
    memo: dict[int, Any] = {id(owner): None for owner in trainers_of(module)}
    for parameter in module.parameters():
        if type(parameter) not in _PLAIN and not hasattr(type(parameter), "__tensor_flatten__"):
            memo[id(parameter)] = _without_values(parameter, mode)
    with _CopyMode(mode):
        made = copy.deepcopy(module, memo)
    if module.device.type != "cpu":
        with mode:
            made.to("cpu")  # its tensors are there; modules that note their device learn it
    return made


class _CopyMode(FakeCopyMode):
    """Lets ``deepcopy`` make tensors without values; those of other devices become tensors of a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Of a parameter deepcopy clones the data.
        if func in (Tensor.__deepcopy__, Tensor.clone) and args[0].device.type != "cpu" and type(args[0]) in _PLAIN:
            made = _on_cpu(args[0], self.fake_mode)
            return made if func is Tensor.clone else args[1].setdefault(id(args[0]), made)
        return super().__torch_function__(func, types, args, kwargs)


def _on_cpu(tensor: Tensor, mode: FakeTensorMode) -> Any:
    """A tensor of a CPU like ``tensor``, without values."""
    with mode:
        made: Any = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    made.requires_grad_(tensor.requires_grad)
    if isinstance(tensor, nn.Parameter):
        made._is_param = True
    return made


def _count_attention(module: nn.Module) -> None:
    """Let models of transformers compute attention by operations that can be traced, not by kernels of their own."""
    models: Iterator[tuple[str, Any]] = hugging_face_models(module)
    for _, model in models:
        if getattr(model.config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
            model.set_attn_implementation("sdpa")


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
        plain = value.detach().as_subclass(Tensor)
        made: Any = mode.from_tensor(plain, static_shapes=True) if plain.device.type == "cpu" else _on_cpu(plain, mode)
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
    with messages_from(logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
