"""A stack of equal blocks in a model, such as the layers of a transformer: fewer of them tell what all of them take."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_lora.memory.live_bytes import LiveBytes

LEAST = 13
"""Equal blocks from which on three shallow traces take less time than a whole one."""
MIDDLE = "middle"
_SIMPLE = (int, float, str, type(None), torch.dtype, torch.Size)


@dataclass(frozen=True)
class EqualBlocks:
    """A run of equal blocks in a list of modules.

    Args:
        start: Number of the first equal block in the container.
        blocks: The equal blocks.
    """

    container: nn.Module
    start: int
    blocks: Sequence[nn.Module]

    @contextlib.contextmanager
    def shortened(self, depth: int) -> Iterator[None]:
        """Within the context the container holds ``depth`` of the equal blocks, and all others."""
        before = dict(self.container._modules)
        members = list(before.values())
        kept = members[: self.start + depth] + members[self.start + len(self.blocks) :]
        try:
            self._hold({str(number): member for number, member in enumerate(kept)})
            yield
        finally:
            self._hold(before)

    @contextlib.contextmanager
    def marked(self, depth: int, live: LiveBytes) -> Iterator[None]:
        """Begin a segment of ``live`` wherever one of the first, second, last or other blocks begins or ends."""
        names = {0: "first", 1: "second", depth - 1: "last"}
        handles: list[Any] = []
        for number, block in enumerate(self.blocks[:depth]):
            before, after = _marks(names.get(number, MIDDLE), live)
            handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hold(self, members: dict[str, nn.Module | None]) -> None:
        self.container._modules.clear()
        self.container._modules.update(members)


def _marks(name: str, live: LiveBytes) -> tuple[Any, Any]:
    def before(*_: Any) -> None:
        live.begin((live.segment[0], "before", name))

    def after(_block: nn.Module, _arguments: Any, output: Any) -> None:
        live.begin((live.segment[0], "after", name))
        for tensor in tree_flatten(output)[0]:
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.register_hook(backward)
                return

    def backward(_: Tensor) -> None:
        live.begin((live.segment[0], "gradient of", name))

    return before, after


def equal_blocks(module: nn.Module) -> EqualBlocks | None:
    """The longest run of equal blocks in a list of ``module``; None if none is worth it.

    Blocks are equal if they have the same classes inside, parameters of the same shapes and types, and the same plain
    settings, but for their own number.
    """
    found = [
        run for child in module.modules() if isinstance(child, (nn.ModuleList, nn.Sequential)) for run in _runs(child)
    ]
    longest = max(found, key=lambda run: len(run.blocks), default=None)
    return longest if longest is not None and len(longest.blocks) >= LEAST else None


def _runs(container: nn.Module) -> Iterator[EqualBlocks]:
    """The runs of equal blocks that are long enough."""
    blocks = list(container.children())
    if len(blocks) < LEAST:
        return
    signatures = [list(_signature(block)) for block in blocks]
    start = 0
    for number in range(1, len(blocks) + 1):
        if number == len(blocks) or not _are_equal(signatures[start], signatures[number], number - start):
            if number - start >= LEAST:
                yield EqualBlocks(container, start, blocks[start:number])
            start = number


def _signature(block: nn.Module) -> Iterator[Any]:
    """What a block is made of: classes, plain settings, and the shapes and types of its tensors."""
    for name, child in block.named_modules():
        yield name, type(child)
        for key, value in vars(child).items():
            values = value if isinstance(value, tuple) else (value,)
            if all(isinstance(each, _SIMPLE) for each in values):
                yield (key, *values)
        for held in (child._parameters, child._buffers):
            for key, tensor in held.items():
                yield key, None if tensor is None else (type(tensor), tensor.shape, tensor.dtype, tensor.requires_grad)


def _are_equal(one: Sequence[Any], other: Sequence[Any], apart: int) -> bool:
    """Whether signatures are equal but for the number of the block, and names in which it stands."""
    return len(one) == len(other) and all(a == b or _is_numbered(a, b, apart) for a, b in zip(one, other, strict=True))


def _is_numbered(one: tuple[Any, ...], other: tuple[Any, ...], apart: int) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, str) and isinstance(b, str):
            return re.sub(r"\.\d+\.", ".#.", a) == re.sub(r"\.\d+\.", ".#.", b)
        return a == b or (type(a) is type(b) is int and b - a == apart)

    return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
