"""What the arithmetic of this room asks of torch without a public function for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

PLAIN_TYPES = (Tensor, nn.Parameter, FakeTensor)
"""Types of tensors that compute as torch's own do; those without values (``FakeTensorMode``) are traced so."""


def has_values(tensor: Tensor) -> bool:
    """Whether the numbers of ``tensor`` can be read: it is neither on the meta device nor fake."""
    return not tensor.is_meta and type(tensor) is not FakeTensor


def saved_tensor_hooks() -> tuple[Any, Any] | None:
    """Innermost pair of hooks on saved tensors in force, or None; activation checkpointing and offloading set them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]


def is_captured(tensor: Tensor) -> bool:
    """Whether what is computed with ``tensor`` now is recorded in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def is_traced() -> bool:
    """Whether every operation must be visible: to ``torch.compile``, ``torch.func`` or forward-mode differentiation."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def is_transformed() -> bool:
    """Whether every operation must be visible to ``torch.func`` or forward-mode differentiation."""
    return is_traced() and not torch.compiler.is_compiling()


def run_while_compiling(function: Any) -> None:
    """Have ``torch.compile`` call ``function`` as it reads a call of it, and take the result for a constant.

    It is ``torch.compiler.assume_constant_result``, but does not import the compiler.
    """
    function._dynamo_marked_constant = True


def is_compiled_within(file: str, function: str, first: int, last: int) -> bool:
    """Whether ``torch.compile`` is reading a function, or what it calls, and writes to the graph of the whole.

    False within a part that has a graph of its own, as under activation checkpointing: state from outside cannot be
    changed there.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._guards import TracingContext

    whole = InstructionTranslator.current_tx().output.current_tracer.parent is None
    stack = TracingContext.extract_stack()
    return whole and any((f.filename, f.name) == (file, function) and first <= (f.lineno or 0) <= last for f in stack)


def outermost_compiled_file() -> str:
    """The file of the function that ``torch.compile`` was asked for and reads, with all that it calls."""
    from torch._guards import TracingContext

    return TracingContext.extract_stack()[0].filename


run_while_compiling(is_compiled_within)
run_while_compiling(outermost_compiled_file)


def let_arguments_override(function: Callable[..., Any]) -> None:
    """Have ``torch.compile`` ask the arguments of ``function`` for ``__torch_function__``, as a call without it does.

    It asks for functions in torch's list of those that can be overridden, which leaves out all with private names.
    """
    torch.overrides.get_overridable_functions()[torch].append(function)


def uninitialised(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor on the device of ``like`` for the caller to write in full.

    It is ``like.new_empty(shape)``, but stays unfilled under ``torch.use_deterministic_algorithms``, which fills what
    ``new_empty`` returns: one more pass over every output.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return like.new_empty(shape, dtype=dtype)
    # Memory by way of a storage: switching torch's global option off and on would race with other threads.
    tensor = like.new_empty(0, dtype=dtype)
    storage = torch.UntypedStorage(math.prod(shape) * tensor.element_size(), device=like.device)
    return tensor.set_(storage, 0, tuple(shape))  # pyright: ignore[reportCallIssue]


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` with the same memory, but as nobody's view: autograd forbids to change an output that is a view."""
    if not tensor._is_view():
        return tensor
    if type(tensor) is FakeTensor:
        return tensor.data  # the storage of a fake tensor that was set by hand never ends
    place = (tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return tensor.new_empty(0).set_(*place)  # pyright: ignore[reportCallIssue, reportArgumentType]
