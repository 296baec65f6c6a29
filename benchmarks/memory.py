"""Memory of a training step: bytes autograd keeps for the backward, and the peak above the base weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.adapters import Adapter
from benchmarks.contenders import Contender, Trainee
from benchmarks.timing import train_step
from benchmarks.workloads import Batch

_MEASURED = "benchmarks: measured step"


def saved_bytes(trainee: Trainee, batch: Batch) -> int:
    """Bytes of the storages autograd saves in the forward, each counted once, without those of parameters.

    Read from the graph: hooks on saved tensors would change what contenders save. What a custom function hides on its
    context, outside ``save_for_backward``, is not seen here; the peak shows it.
    """
    parameters = {p.untyped_storage().data_ptr() for p in trainee.model.parameters()}
    loss = trainee.loss(trainee.model, batch)
    seen, todo, kept = set(), [loss.grad_fn], {}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        for tensor in _saved(node):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in parameters)


def _saved(node: Any) -> Iterator[Tensor]:
    """Tensors that a node of autograd's graph keeps."""
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            value = getattr(node, name)
            yield from (item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, Tensor))


def peak_bytes(base: nn.Module, adapter: Adapter, contender: Contender, batch: Batch) -> tuple[Trainee, int]:
    """Adapt ``base``, train three steps, and say how many bytes above the base weights the third held at its peak.

    Adapters, gradients, optimizer state and whatever a contender caches are counted; the first two steps make the
    optimizer's state.

    Returns:
        The contender, ready to train, and the bytes.
    """
    measure = _peak_on_gpu if batch.input_ids.is_cuda else _peak_on_cpu
    return measure(lambda: contender.adapt(base, adapter), batch)


def _peak_on_gpu(adapt: Callable[[], Trainee], batch: Batch) -> tuple[Trainee, int]:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    trainee = adapt()
    for _ in range(2):
        train_step(trainee, batch)
    torch.cuda.reset_peak_memory_stats()
    train_step(trainee, batch)
    return trainee, torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(adapt: Callable[[], Trainee], batch: Batch) -> tuple[Trainee, int]:
    trained: list[Trainee] = []

    def prepare() -> None:
        trained.append(adapt())
        for _ in range(2):
            train_step(trained[0], batch)

    peak = peak_on_cpu(lambda: train_step(trained[0], batch), prepare)
    return trained[0], peak


def peak_on_cpu(step: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> int:
    """Bytes that ``step`` held at its peak, with what ``prepare`` has left, temporaries inside operators included."""
    gc.collect()  # blocks of earlier measures that were freed within this one would be taken off
    # The allocator reports to the profiler. Blocks from before are not counted.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepare()
        with record_function(_MEASURED):
            step()
    return peak_in_profile(profiler, _MEASURED)


def peak_in_profile(profiler: profile, mark: str) -> int:
    """Bytes held at the peak since ``mark`` began, with those from before in the same profile."""
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events: list[Any] = results.events()  # their stubs lack nbytes
    begin = next(event.start_ns() for event in events if event.name() == mark)
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, held)
    return peak
