"""Convolutions whose weight the module around them reads without calling them.

Linear attention and state space models call their short convolution in some modes and hand its weight to a kernel in
others: an update in its ``forward`` would come and go. Which do is told by their source.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator

from torch import nn

_Conv = nn.modules.conv._ConvNd


def read_convolutions(root: nn.Module) -> Iterator[tuple[str, _Conv, nn.Module]]:
    """Dotted name, convolution and reader of each."""
    modules = dict(root.named_modules())
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if name and isinstance(module, _Conv) and _reads(modules[parent], leaf):
            yield name, module, modules[parent]


def is_filter(module: nn.Module) -> bool:
    """Whether a module is a depthwise convolution: a small filter for each channel, no weight matrix."""
    return isinstance(module, _Conv) and module.groups == module.in_channels > 1


def _reads(reader: nn.Module, child: str) -> bool:
    # The type and the device of a weight are often asked for; that is no reading.
    pattern = rf"self\.{re.escape(child)}\.weight(?!\w|\.(?:dtype|device|shape|size))"
    return any(re.search(pattern, _source(kind)) is not None for kind in type(reader).__mro__)


@functools.cache
def _source(kind: type) -> str:
    if kind.__module__.startswith("torch.") or not issubclass(kind, nn.Module):
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed into a prompt: the guard will tell
        return ""
