"""A pytest plugin that puts LoRA into the models of Lightning's tests, and our CheckpointIO into every Trainer.

The classes stay the objects they are, so that subclasses, pickles and class paths keep working: only `LoRAMixin` comes
among their bases, with a small setting as class attribute.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.demos import boring_classes
from lightning.pytorch.strategies import strategy

from lightning_lora import LoRAConfig
from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO
from lightning_lora.mixin.lora_mixin import LoRAMixin

HELPERS = "tests_pytorch.helpers"
# The smallest layers of these tests have one output.
SETTING = LoRAConfig(rank=1, alpha=2.0)


def pytest_configure() -> None:
    """Change Lightning's own classes before any test imports them."""
    adapt(boring_classes.BoringModel)
    # This is the default; a test or user that gives a CheckpointIO keeps it.
    strategy.TorchCheckpointIO = VerifiedCheckpointIO  # pyright: ignore[reportPrivateImportUsage]


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """Change the models that the tests share; the folder of the tests is importable from here on."""
    for model in _shared_models():
        if not issubclass(model, LoRAMixin):
            adapt(model)


def adapt(model: type[LightningModule]) -> None:
    """Put `LoRAMixin` in the place of `LightningModule` among the bases of ``model``."""
    model.__bases__ = tuple(LoRAMixin if base is LightningModule else base for base in model.__bases__)
    model.lora = SETTING  # pyright: ignore[reportAttributeAccessIssue]
    for kind in (model, *_subclasses(model)):
        # Python calls it for classes that are made later, but not for those that exist.
        LoRAMixin.__init_subclass__.__func__(kind)  # pyright: ignore[reportFunctionMemberAccess]


def _subclasses(kind: type) -> Iterator[type]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def _shared_models() -> Iterator[type[LightningModule]]:
    """The LightningModules that inherit from nothing else, in the helpers of Lightning's tests."""
    folder = importlib.import_module(HELPERS)
    for found in pkgutil.iter_modules(folder.__path__, f"{HELPERS}."):
        if not found.name.rpartition(".")[2].startswith("test_"):
            for value in vars(importlib.import_module(found.name)).values():
                if isinstance(value, type) and LightningModule in value.__bases__:
                    yield value
