"""A module for a while in the mode of evaluation, or as it was written although it is compiled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put all layers into eval mode for the block, and each back into its own mode at the end."""
    modes = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode


def uncompiled() -> AbstractContextManager[Any]:
    """A context in which compiled modules run as they were written: to try a few tokens is not worth compiling for."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
