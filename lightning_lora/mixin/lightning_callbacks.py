"""Lightning's callbacks that act on weights: which are refused beside adapters, and which are made exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_lora.errors import OptimizerSettingError
from lightning_lora.lightning_private import averaged_model
from lightning_lora.trainer_access import found

_REFUSED: dict[type[Callback], str] = {
    StochasticWeightAveraging: "copies the module in setup, before LoRA adapts it, and would average the base. Use "
    "AdapterEMA instead.",
    BaseFinetuning: "freezes and unfreezes modules while they train: adapters of a frozen module would train, and an "
    "unfrozen base would too. Leave it out: the base stays frozen anyway, adapters learn from the first step, and "
    "LoRAConfig(trainable=[...]) trains a new head in full.",
    ModelPruning: "sets weights of the frozen base to zero, which is then no longer the base of the adapters. Prune "
    "the base before, or the merged model after training.",
}


def refuse_callbacks(trainer: Trainer | None) -> None:
    """Raise `ConfigError` if a callback of a ``fit`` changes the base, or which weights train."""
    if trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return
    for kind, reason in _REFUSED.items():
        if callback := found(trainer, kind):
            raise OptimizerSettingError(f"{type(callback).__name__} {reason}")


def keep_averages_exact(trainer: Trainer) -> None:
    """Let Lightning's `WeightAveraging` leave equal values as they are: its sums would change the base by rounding."""
    callback = found(trainer, WeightAveraging)
    model = None if callback is None else averaged_model(callback)
    if model is None:
        return
    if model.avg_fn is not None and not isinstance(model.avg_fn, _Exact):
        model.avg_fn = _Exact(model.avg_fn)
    if model.multi_avg_fn is not None and not isinstance(model.multi_avg_fn, _ExactLists):
        model.multi_avg_fn = _ExactLists(model.multi_avg_fn)


@dataclass(frozen=True)
class _Exact:
    average: Callable[..., Tensor]

    def __call__(self, old: Tensor, new: Tensor, count: Any) -> Tensor:
        # The comparison stays on the device: asking for its result would wait once per weight.
        return torch.where(old == new, old, self.average(old, new, count))


@dataclass(frozen=True)
class _ExactLists:
    average: Callable[..., Any]

    def __call__(self, old: Any, new: Any, count: Any) -> None:
        pairs = [pair for pair in zip(old, new, strict=True) if not torch.equal(*pair)]
        if pairs:
            self.average([pair[0] for pair in pairs], [pair[1] for pair in pairs], count)
