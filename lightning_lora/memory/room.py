"""How much memory a training step may take on the device of a run: told by the driver or the operating system."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

from lightning_lora.memory.step_trace import weight_tensors

_PROC = Path("/proc")
# The files of a container's limit, of what it uses, and what of it can be dropped, in both versions of cgroups.
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class Room:
    """Memory of a device for a training step.

    Args:
        bytes: Bytes that the step may take, with weights, gradients and optimizer.
        is_limit: Whether memory beyond it is refused: that of a GPU, or a limit set for this process or its container.
            False for the memory that a machine has left.
    """

    bytes: int
    is_limit: bool


def room_for_step(device: torch.device, held: Iterable[Tensor]) -> Room | None:
    """The memory of ``device`` for a step; None where nobody tells.

    It is what is free, and what the step's own tensors take already. Whatever else is on the device, such as other
    processes, the context of CUDA, buckets of DDP or another model, is not part of it.

    Args:
        held: Tensors that exist and are part of the step, `tensors_of_step`.
    """
    own = sum(tensor.nbytes for tensor in held if tensor.device.type == device.type)
    if device.type == "cuda":
        return Room(_left_on_cuda(device) + own, is_limit=True)
    if device.type == "mps":
        return Room(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory() + own, is_limit=True)
    if device.type != "cpu":
        return None
    limits = [left for left in (_left_in_address_space(), *_left_in_container()) if left is not None]
    machine = _available()
    if limits and (machine is None or min(limits) <= machine):
        return Room(max(0, min(limits)) + own, is_limit=True)
    return None if machine is None else Room(machine + own, is_limit=False)


def tensors_of_step(module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Iterator[Tensor]:
    """Weights, buffers, gradients and the state of optimizers, as far as they exist."""
    yield from weight_tensors(module)
    yield from (parameter.grad for parameter in module.parameters() if parameter.grad is not None)
    for optimizer in optimizers:
        yield from (item for item in tree_flatten(list(optimizer.state.values()))[0] if isinstance(item, Tensor))


def bytes_between_steps(module: nn.Module) -> int:
    """Bytes of ``module`` without activations: weights, and for those that are trained gradients and Adam's state."""
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    return 3 * trained + sum(tensor.nbytes for tensor in weight_tensors(module))


def container_limits() -> Iterator[int]:
    """Bytes that the container of this process may use, as each version of cgroups limits it."""
    found = (_number(folder / limit) for folder, limit, *_ in _CGROUPS)
    yield from (limit for limit in found if limit is not None)


def _left_on_cuda(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    most = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free + reserved, most) - allocated


def _left_in_address_space() -> int | None:
    """Bytes that may still be mapped under ``ulimit -v``; None without such a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    sizes = _PROC / "self" / "statm"
    if limit == resource.RLIM_INFINITY or not sizes.is_file():
        return None
    return limit - int(sizes.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _left_in_container() -> Iterator[int | None]:
    for folder, limit, used, droppable in _CGROUPS:
        allowed, taken = _number(folder / limit), _number(folder / used)
        if allowed is not None and taken is not None:
            yield allowed - taken + (_number(folder / "memory.stat", droppable) or 0)


def _available() -> int | None:
    """Bytes that the machine can give without swapping; None where the system does not tell."""
    found = _number(_PROC / "meminfo", "MemAvailable:")
    return None if found is None else found * 1024


def _number(path: Path, name: str = "") -> int | None:
    """The number in a file, or the one behind ``name`` at the start of a line; None if there is none."""
    text = path.read_text() if path.is_file() else ""
    match = re.search(rf"^{re.escape(name)}\s*(\d+)", text, re.MULTILINE)
    return None if match is None else int(match[1])
