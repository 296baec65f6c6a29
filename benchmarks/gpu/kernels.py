"""Kernels of a step: a trace, CUDA graphs, torch.compile."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Trainee, loss_at_head
from benchmarks.gpu.contenders import floor, launch_step, ours, with_peft
from benchmarks.gpu.models import batch_of, llama
from benchmarks.gpu.place import Place, milliseconds
from benchmarks.timing import train_step
from benchmarks.workloads import IGNORED, Batch, next_token_loss
from lightning_lora.batch_facts import BatchFacts


def traced(place: Place) -> dict[str, Any]:
    """Kernels of one step of four layers of 1B: ours, the floor, PEFT."""
    base, batch = llama(place, "1b", 4, 4096), batch_of(place, 4096, 4, 2048)
    for name, make in (("floor", floor), ("ours", ours), ("PEFT", with_peft)):
        trainee = make(base, next_token_loss)
        for _ in range(4):
            train_step(trainee, batch)
        profiler = _profile(place, partial(launch_step, trainee, batch))
        kernels: dict[str, list[float]] = {}
        for event in profiler.events() or ():
            if place.dry or event.device_type.name == "CUDA":
                kernels.setdefault(event.name[:90], []).append(event.cpu_time if place.dry else event.device_time)
        top = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:14]
        place.found[name] = {
            "kernels": sum(map(len, kernels.values())),
            "sum ms": sum(map(sum, kernels.values())) / 1e3,
            "top": [f"{sum(times) / 1e3:8.3f} ms {len(times):4d}x {kernel}" for kernel, times in top],
        }
        if name == "ours":
            profiler.export_chrome_trace(str(place.out / "trace.json"))
            subprocess.run(["gzip", "-f", str(place.out / "trace.json")], check=False)
    return place.found


def _profile(place: Place, function: Callable[[], object]) -> profile:
    activities = [ProfilerActivity.CPU, *([] if place.dry else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as profiler:
        function()
        place.sync()
    return profiler


def graphs(place: Place) -> dict[str, Any]:
    """Can forward and backward be captured; what is won where the host is the limit."""
    if place.dry:
        return {"skipped": "needs CUDA"}
    base, batch = llama(place, "100m", None, 4096), batch_of(place, 4096, 1, 1024)
    facts = BatchFacts.of(batch.labels.cpu(), None, IGNORED).to(batch.labels.device)
    contenders = {
        "floor": floor(base, next_token_loss),
        "ours": ours(base, next_token_loss),
        "ours, dropout": ours(base, next_token_loss, dropout=0.1),
        "ours, our loss": ours(base, partial(loss_at_head, facts=facts)),
        "PEFT": with_peft(base, next_token_loss),
    }
    for name, trainee in contenders.items():
        try:
            place.found[name] = _captured(place, trainee, batch)
        except Exception as reason:
            place.found[name] = f"failed: {str(reason).splitlines()[0][:200]}"
    return place.found


def _captured(place: Place, trainee: Trainee, batch: Batch) -> dict[str, float]:
    def both() -> None:
        trainee.loss(trainee.model, batch).backward()

    eager = milliseconds(place, both, 10, 5)
    for parameter in trainee.model.parameters():
        parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter.grad)
    # Capturing wants a step on another stream first.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    return {"eager ms": eager, "graph ms": milliseconds(place, graph.replay, 10, 3)}


def compiled(place: Place) -> dict[str, Any]:
    """torch.compile of four layers of 1B."""
    base, batch = llama(place, "1b", 4, 4096), batch_of(place, 4096, 4, 2048)
    everyone = {"ours": ours, "floor": floor, "PEFT": with_peft}
    for name in place.pick(everyone, ["ours"]):
        trainee = everyone[name](base, next_token_loss)
        step = partial(launch_step, trainee, batch)
        eager = milliseconds(place, step, 5, 3)
        start = time.perf_counter()
        trainee.model.compile(**place.pick({}, {"backend": "eager"}))
        train_step(trainee, batch)
        seconds = time.perf_counter() - start
        place.found[name] = {"compile s": seconds, "eager ms": eager, "compiled ms": milliseconds(place, step, 5, 2)}
    return place.found
