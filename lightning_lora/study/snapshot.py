"""Copies a module in training, sharing frozen weights, and isolates code that runs the copy."""

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
from lightning_lora.errors import ProbeError
from lightning_lora.lightning_messages import messages_from
from lightning_lora.lightning_private import attached_trainer
from lightning_lora.lora.changed_tensors import recorded_parameters
from lightning_lora.lora.layers.adapted import held_factors
from lightning_lora.lora.patterns import plain_name


def copy_module(module: LightningModule) -> LightningModule:
    """A deep copy without a Trainer, which uses the same memory for frozen weights.

    Raises:
        ConfigError: If the ``forward`` of a layer was replaced by a function, which would call the original layer.
    """
    for name, child in module.named_modules():
        own = child.__dict__.get("forward")
        if inspect.isfunction(own) and own.__closure__:
            raise ProbeError(
                f"the forward of {name or type(module).__name__!r} was replaced by {own.__qualname__}, which a copy "
                f"would share with the original: remove it before probing."
            )
    # A frozen copy that follows the network, such as a teacher, changes in the branch.
    moving = recorded_parameters(module) | held_factors(module).keys()
    named = ((plain_name(name), p) for name, p in module.named_parameters())
    frozen = [p for name, p in named if not p.requires_grad and name not in moving]
    memo: dict[int, Any] = {id(p): _same_memory(p) for p in frozen}
    trainer = attached_trainer(module)
    module.trainer = None
    try:
        if trainer is not None:
            memo[id(trainer)] = None
        return copy.deepcopy(module, memo)
    finally:
        module.trainer = trainer


def _same_memory(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter over the same memory. Moving it to a device leaves the first where it is."""
    if type(parameter) is not nn.Parameter:
        return parameter  # quantised parameters carry more than their values
    return nn.Parameter(parameter.detach(), requires_grad=False)


@contextmanager
def isolated(device: torch.device, seed: int) -> Iterator[None]:
    """Draw random numbers from seeded generators, restore those of the run on exit, and silence logs and warnings."""
    with kept_random_state(device), warnings.catch_warnings(), messages_from(logging.ERROR):
        # Not seed_everything, which leaves the seed in the environment.
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")
        yield
