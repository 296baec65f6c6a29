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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry

from lightning_lora.memory.attention_flops import attention_backward_flops, attention_flops
from lightning_lora.memory.live_bytes import LiveBytes

aten: Any = torch.ops.aten
_DEVICE: Any = torch.ops.prim.device.default

MOST_KNOWN = 2**24
"""Elements of a tensor above which its values are not kept."""
_KNOWN_TYPES = (torch.bool, torch.int32, torch.int64)


class StepMode(TorchDispatchMode):
    """The dispatch mode of a trace; it enters the `FakeTensorMode` that it works with.

    Attributes:
        live: Bytes of the storages.
        flops: Floating-point operations of matrix products, convolutions and attention so far.
        attention_flops: Those of attention, which grow with the square of a row's length.
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
        tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
        self.running[:] = [func]
        if tensors and _all_known(tensors):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        else:
            result = self._without_values(func, args, kwargs)
        self._count(func, args, kwargs, result)
        self.running.clear()
        return result

    def _without_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        made_up = _MADE_UP.get(func)
        if made_up is not None:
            return made_up(self, *args, **kwargs)
        written = _written(func, args, kwargs)
        if written is not None:
            return written
        result = func(*args, **kwargs)
        is_small = isinstance(result, FakeTensor) and result.numel() <= MOST_KNOWN
        if is_small and result.dtype in _KNOWN_TYPES and not _has_tensor(args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        flops = _flops(func, args, kwargs, result)
        if flops is not None:
            self.flops += flops
            self.attention_flops += flops if "_attention" in str(func) else 0
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                is_scores = tensor.ndim > 1 and tensor.shape[-1] in self.class_counts and tensor.is_floating_point()
                self.live.add(tensor, "logits" if is_scores else "activations")
        inside = _INSIDE.get(str(func))
        if inside is not None:
            self.live.for_a_moment(inside(*args))


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


def _has_tensor(args: Any, kwargs: Any) -> bool:
    return any(isinstance(item, Tensor) for item in tree_flatten((args, kwargs))[0])


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


def _dequantised(x: Tensor, _: Tensor, shape: Sequence[int], *__: Any) -> int:
    return math.prod(shape) * x.element_size()


def _widened(x: Tensor, _: int, dtype: torch.dtype | None = None, **__: Any) -> int:
    return 0 if dtype in (None, x.dtype) else x.numel() * dtype.itemsize


def _reordered(x: Tensor, weight: Tensor, _: Tensor | None, stride: Sequence[int], *__: Any) -> int:
    outputs = x.shape[0] * weight.shape[0] * math.prod(-(-n // s) for n, s in zip(x.shape[2:], stride, strict=False))
    return max(x.nbytes + weight.nbytes, outputs * x.element_size())


def _reordered_backward(d_y: Tensor, x: Tensor, *arguments: Any) -> int:
    needs_weight = arguments[-1][1]
    return x.nbytes + d_y.nbytes if needs_weight else max(x.nbytes, d_y.nbytes)


# Operations that hold more inside than they return, on a CPU: copies in the layout of oneDNN, in another type, or of a
# dequantised weight; as the allocator's events show.
_INSIDE: dict[str, Any] = {
    "bitsandbytes.gemm_4bit.default": _dequantised,
    "aten.softmax.int_out": _widened,
    "aten.convolution.default": _reordered,
    "aten.convolution_backward.default": _reordered_backward,
}


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int | None:
    packet = getattr(func, "_overloadpacket", None)
    if (own := _OWN_FLOPS.get(str(packet))) is not None:
        return own(*args)
    formula = flop_registry.get(packet)
    if formula is None and str(packet).endswith("_"):
        # The registry of torch lacks the forms that write into their first argument.
        namespace, _, name = str(packet).rpartition(".")
        formula = flop_registry.get(getattr(aten, name[:-1], None)) if namespace == "aten" else None
    if formula is None:
        return None
    kwargs = {name: value for name, value in kwargs.items() if name != "out"}
    return formula(*args, **kwargs, out_val=result)


def _grouped(x: Tensor, matrices: Tensor, *_: Any) -> int:
    """Every row (or column) takes part in one product."""
    if x.ndim == 2 and matrices.ndim == 2:  # (m, rows) (rows, n), one result for each group
        return 2 * x.shape[0] * x.shape[1] * matrices.shape[1]
    return 2 * x.numel() * matrices.shape[-1]


def _four_bits(x: Tensor, _: Tensor, shape: Sequence[int], *__: Any) -> int:
    return 2 * x.numel() * shape[0]


_OWN_FLOPS: dict[str, Any] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": attention_flops,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": attention_backward_flops,
    "aten._grouped_mm": _grouped,
    "bitsandbytes.gemm_4bit": _four_bits,
}


def known_batch(batch: Any) -> Any:
    """A copy of a batch on a CPU, for a trace: its values are kept unless they are many."""

    def copied(tensor: Tensor) -> Tensor:
        if tensor.numel() > MOST_KNOWN:
            return torch.empty_like(tensor, device="meta")
        return tensor.detach().to("cpu", copy=True)

    return tree_map_only(Tensor, copied, batch)
