"""A copy of a data module that is set up as training would set it up, while the user's own stays as it is."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import Sampler

from lightning_lora.lightning_messages import messages_from

Data = TypeVar("Data", bound=LightningDataModule)
Thing = TypeVar("Thing")
_GENERATORS = numpy.random.Generator, numpy.random.RandomState, random.Random


@contextmanager
def set_up(datamodule: Data, module: LightningModule | None) -> Iterator[Data]:
    """Set up a copy of ``datamodule`` for ``fit``; within the context, random draws do not count for later ones.

    The copy is shallow: what ``setup`` assigns stays in it, and its random generators are copies.

    Args:
        datamodule: The data module; a module set up before is set up anew.
        module: The module that would be trained, whose tokenizer, vocabulary and context length count.
    """
    twin = copy_with_generators(datamodule)
    with isolate_rng():
        twin.trainer = quiet_trainer()
        twin.trainer.state.fn = TrainerFn.FITTING
        if module is not None:
            twin.trainer.strategy.connect(module)
        twin.prepare_data()
        twin.setup("fit")
        yield twin


def copy_with_generators(thing: Thing) -> Thing:
    """A shallow copy with lists, mappings and random generators of its own, so that drawing leaves the first as is.

    Samplers inside it are copied in the same way.
    """
    twin = copy.copy(thing)
    for name, value in getattr(thing, "__dict__", {}).items():
        if isinstance(value, torch.Generator):
            value = value.clone_state()
        elif isinstance(value, _GENERATORS):
            value = copy.deepcopy(value)
        elif isinstance(value, (dict, list)):
            value = copy.copy(value)
        elif isinstance(value, Sampler):
            value = copy_with_generators(value)
        twin.__dict__[name] = value
    return twin


def quiet_trainer(**options: Any) -> Trainer:
    """A Trainer on one device at hand that writes and prints nothing."""
    with messages_from(logging.WARNING):
        return Trainer(
            accelerator="auto",
            devices=1,
            plugins=[LightningEnvironment()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
