"""A copy of a module in training that shares what is frozen, and a place apart to run it."""

from __future__ import annotations

import copy
import inspect
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.errors import ConfigError
from lightning_lora.lightning_private import attached_trainer


def copied(module: LightningModule, *, shares_frozen: bool = True) -> LightningModule:
    """A deep copy that knows no Trainer; frozen weights are shared unless they are to be trained.

    Raises:
        ConfigError: If something has replaced a layer's ``forward`` by a function that would call the original.
    """
    for name, child in module.named_modules():
        own = child.__dict__.get("forward")
        if inspect.isfunction(own) and own.__closure__:
            raise ConfigError(
                f"the forward of {name or type(module).__name__!r} is replaced by a function of its own, which a copy "
                f"would share: take {own.__qualname__} off before probing."
            )
    frozen = [p for p in module.parameters() if shares_frozen and not p.requires_grad]
    memo: dict[int, Any] = {id(p): _other_name(p) for p in frozen}
    trainer = attached_trainer(module)
    module.trainer = None
    try:
        if trainer is not None:
            memo[id(trainer)] = None
        return copy.deepcopy(module, memo)
    finally:
        module.trainer = trainer


def _other_name(parameter: nn.Parameter) -> nn.Parameter:
    """The same values in memory as a parameter of its own, which can be moved without the first."""
    if type(parameter) is not nn.Parameter:
        return parameter  # quantised ones carry more than their values
    return nn.Parameter(parameter.detach(), requires_grad=False)


@contextmanager
def apart(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from generators of its own, and say nothing: a branch would repeat what the run has said."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    with kept_random_state(device), warnings.catch_warnings():
        # Not seed_everything, which leaves the seed in the environment.
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
