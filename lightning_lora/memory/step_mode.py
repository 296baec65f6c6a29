"""Runs operations on tensors without values, counts what is alive, and counts products.

Three rules decide what an operation returns. If all its tensors have values (a batch, its labels, masks and positions
made from them), it is computed. If one of them has none (a weight, and all that follows from it), the result has none
either. Where code asks for numbers that depend on weights, they are made up so that a step is a usual one: the choice
of a router is even over all experts, an order is as it came, a mask of unknown values takes everything, a number is 1.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lightning_lora.memory.counted import counted_of
from lightning_lora.memory.live_bytes import LiveBytes

aten: Any = torch.ops.aten
_DEVICE: Any = torch.ops.prim.device.default

MOST_KNOWN = 2**24
"""Elements of a tensor above which its values are not kept."""
_KNOWN_TYPES = (torch.bool, torch.int32, torch.int64)
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._unsafe_view.default}
"""Operations that take as little as views do."""
_NO_VIEWS = {aten.lift_fresh.default}
"""Operations that return their argument itself."""


class StepMode(TorchDispatchMode):
    """The dispatch mode of a trace; it enters the `FakeTensorMode` that it works with.

    Attributes:
        flops: Floating-point operations of matrix products, convolutions and attention so far.
        attention_flops: The operations of attention among them, which grow with the square of a row's length.
        class_counts: Sizes of a last axis that are a vocabulary or classes.
        running: The operation that runs now, or that failed last.
        truth: What the truth of a tensor without values is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = LiveBytes()
        self.flops = self.attention_flops = 0
        self.class_counts: set[int] = set()
        self.running: list[Any] = []
        self.truth = True

    @contextlib.contextmanager
    def entered(self) -> Iterator[StepMode]:
        """Within the context every operation is traced."""
        with self.fake, self:
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # more than half of all calls
            return torch.device("meta") if self.fake.in_kernel_invocation else args[0].fake_device
        kwargs = kwargs or {}
        tensors = [*_tensors_in(args), *_tensors_in(kwargs.values())]
        self.running[:] = [func]
        if tensors and _all_known(tensors):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        else:
            result = self._without_values(func, args, kwargs, tensors)
        self._count(func, args, kwargs, result)
        self.running.clear()
        return result

    def _without_values(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        made_up = _MADE_UP.get(func)
        if made_up is not None:
            return made_up(self, *args, **kwargs)
        written = _written(func, args, kwargs)
        if written is not None:
            return written
        if _is_plain(func) and all(type(tensor) is FakeTensor and tensor.constant is None for tensor in tensors):
            return self._shaped(func, args, kwargs, tensors)
        result = func(*args, **kwargs)
        is_small = isinstance(result, FakeTensor) and result.numel() <= MOST_KNOWN
        if is_small and result.dtype in _KNOWN_TYPES and not tensors:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return result

    def _shaped(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Any]) -> Any:
        """The result by torch's own rule for shapes, without the search in the cache of `FakeTensorMode`.

        Views and products are most operations of a step, and take a sixth of the time so.
        """
        with in_kernel_invocation_manager(self.fake):
            found = func(*args, **kwargs)
        device = tensors[0].fake_device
        if isinstance(found, Tensor):
            return FakeTensor(self.fake, found, device)
        return [FakeTensor(self.fake, each, device) for each in found]

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        counted = counted_of(func)
        if counted.flops is not None:
            flops = counted.flops(args, kwargs, result)
            self.flops += flops
            self.attention_flops += flops if counted.is_attention else 0
        for tensor in _tensors_in((result,)):
            if tensor.layout is torch.strided:
                is_scores = tensor.ndim > 1 and tensor.shape[-1] in self.class_counts and tensor.is_floating_point()
                self.live.add(tensor, "logits" if is_scores else "activations")
        if counted.inside is not None:
            self.live.for_a_moment(counted.inside(*args))


def _tensors_in(items: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments or results, which are flat but for lists of tensors."""
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors_in(item)


@functools.cache
def _is_plain(func: Any) -> bool:
    """Whether an operation is a view or a product, whose result is on the device of its arguments."""
    return func in _PRODUCTS or (
        func.namespace == "aten" and func.is_view and torch.Tag.inplace_view not in func.tags and func not in _NO_VIEWS
    )


def _all_known(tensors: Sequence[Tensor]) -> bool:
    return not any(isinstance(tensor, FakeTensor) for tensor in tensors) and all(
        tensor.numel() <= MOST_KNOWN for tensor in tensors
    )


@functools.cache
def _place_of_result(func: Any) -> int | str | None:
    """The argument that an operation of torch fills and returns as it is, by position or name."""
    schema = func._schema
    if not schema.name.startswith("aten::") or torch.Tag.inplace_view in func.tags or len(schema.returns) != 1:
        return None
    if schema.name.endswith("_"):
        return 0
    return "out" if schema.overload_name == "out" or schema.overload_name.endswith("_out") else None


def _written(func: Any, args: Any, kwargs: Any) -> FakeTensor | None:
    """The tensor that the operation fills and returns, whose shape is known; None if it makes another one.

    A loop over experts is made of such operations: without this rule a trace of it takes four times as long.
    """
    place = _place_of_result(func)
    if place is None:
        return None
    written = kwargs.get("out") if place == "out" else args[0]
    return written if isinstance(written, FakeTensor) and written.numel() else None


def _known(make: Callable[[], Tensor]) -> Tensor:
    with unset_fake_temporarily():
        return make()


def _even_choice(mode: StepMode, x: Tensor, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    """``topk`` that takes the classes in turn."""
    values, indices = aten.topk.default(x, k, dim, *args, **kwargs)
    if indices.numel() > MOST_KNOWN or indices.ndim == 0:
        return values, indices
    classes, shape = x.shape[dim], list(indices.movedim(dim, -1).shape)
    return values, _known(lambda: (torch.arange(math.prod(shape)) % classes).view(shape).movedim(-1, dim))


def _even_maximum(mode: StepMode, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """``argmax`` that takes the classes in turn."""
    found = aten.argmax.default(x, dim, keepdim)
    if found.numel() > MOST_KNOWN:
        return found
    classes = x.numel() if dim is None else x.shape[dim]
    return _known(lambda: (torch.arange(found.numel()) % classes).view(found.shape))


def _as_it_came(mode: StepMode, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``sort`` that finds everything in order already."""
    dim = kwargs.get("dim", next((a for a in reversed(args) if isinstance(a, int) and not isinstance(a, bool)), -1))
    stable = {"stable": kwargs["stable"]} if "stable" in kwargs else {}
    values, indices = (aten.sort.stable if stable else aten.sort.default)(x, **stable, dim=dim)
    if indices.numel() > MOST_KNOWN:
        return values, indices
    length = x.shape[dim] if x.ndim else 1
    shape = [length if axis == dim % max(x.ndim, 1) else 1 for axis in range(x.ndim)]
    return values, _known(lambda: torch.arange(length).view(shape).expand(x.shape).contiguous())


def _everything(mode: StepMode, x: Tensor) -> Tensor:
    """``nonzero`` of a mask that is true everywhere."""
    return _known(lambda: torch.ones(x.shape, dtype=torch.bool).nonzero())


def _of_masks(mode: StepMode, x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Indexing whose masks are known, or else true everywhere."""
    positions: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            positions.append(index)
        elif isinstance(index, FakeTensor):
            positions += _everything(mode, index).unbind(1)
        else:
            with unset_fake_temporarily():
                positions += index.nonzero().unbind(1)
    return aten.index.Tensor(x, positions)


def _one(mode: StepMode, x: Tensor) -> Any:
    """The number in a tensor: 1."""
    return mode.truth if x.dtype is torch.bool else 1.0 if x.dtype.is_floating_point else 1


def _grouped_product(mode: StepMode, x: Tensor, matrices: Tensor, offs: Tensor | None = None, *_: Any) -> Tensor:
    """A grouped product in any type: torch's rule for tensors without values knows bfloat16 only."""
    if x.ndim == 2 and matrices.ndim == 2:
        assert offs is not None
        return x.new_empty(len(offs), x.shape[0], matrices.shape[1])
    return x.new_empty(*x.shape[:-1], matrices.shape[-1])


_MADE_UP: dict[Any, Any] = {
    aten._grouped_mm.default: _grouped_product,
    aten.topk.default: _even_choice,
    aten.argmax.default: _even_maximum,
    aten.sort.default: _as_it_came,
    aten.sort.stable: _as_it_came,
    aten.nonzero.default: _everything,
    aten.index.Tensor: _of_masks,
    aten._local_scalar_dense.default: _one,
}


def known_batch(batch: Any) -> Any:
    """A copy of a batch on a CPU, for a trace: its values are kept unless they are many."""

    def copied(tensor: Tensor) -> Tensor:
        if tensor.numel() > MOST_KNOWN:
            return torch.empty_like(tensor, device="meta")
        return tensor.to("cpu", copy=True).detach()  # a view of the batch would count as alive

    return tree_map_only(Tensor, copied, batch)
