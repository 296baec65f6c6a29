"""What `plan` says of a run, beside the run: memory and time, in a Trainer."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu.place import Place
from benchmarks.gpu.training import causal_lm, fit, gsm8k, model_folder
from lightning_lora.callbacks import PlannedRun
from lightning_lora.planning.make_plan import plan


def planned(place: Place) -> dict[str, Any]:
    """Planned beside measured: LoRA, full fine-tuning, NF4, packing, mixed precision."""
    place.found["context"] = _context(place)
    low, mixed = {"precision": "bf16-true"}, {"precision": "bf16-mixed"}
    # Settings of the task, settings of the data, options of the Trainer.
    runs: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "lora, bf16-true": ({}, {}, low),
        "lora, bf16-true, packing": ({}, {"packing": True}, low),
        "qlora, bf16-true": ({"quantization": "nf4", "dtype": "bfloat16"}, {}, low),
        "lora, bf16-mixed": ({}, {}, mixed),
        "full, bf16-true": ({"lora": None}, {}, low),
        "full, bf16-mixed": ({"lora": None}, {}, mixed),
    }
    # A plan takes seconds: a dry run shows that one works.
    for name, (task, data, options) in list(runs.items())[: place.pick(len(runs), 1)]:
        place.fresh()
        try:
            place.found[name] = _said(place, name, task, data, options) | _done(place, task, data, options)
        except Exception as reason:
            place.found[name] = {"failed": f"{type(reason).__name__}: {str(reason)[:300]}"}
    return place.found


def _said(
    place: Place, name: str, task: dict[str, Any], data: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """What a plan of the run says, with a table of devices, and with steps timed here."""
    found: dict[str, Any] = {}
    rows = place.pick(8, 2)
    trainer = options | {"max_steps": _steps(place), "limit_val_batches": 0, "accelerator": place.pick("gpu", "cpu")}
    for how, calibrate in (("table", False), ("timed", True)) if name == "lora, bf16-true" else (("timed", True),):
        start = time.perf_counter()
        module = causal_lm(model_folder(place), **task)
        said = plan(
            module,
            gsm8k(place, 8, 512, **data),
            trainer=trainer,
            calibrate=calibrate,
            target_batch_size=rows,
        )
        found[f"seconds, {how}"] = said.numbers["time"]
        found[f"plan took, {how}"] = round(time.perf_counter() - start, 1)
        found["method"] = said.method
        memory = said.memory[name.partition(",")[0]]
        found["GiB"] = memory and round(memory.total / 2**30, 3)
        found["batch"] = said.settings["batch_size"]
    return found


def _done(place: Place, task: dict[str, Any], data: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What the run took."""
    watch = PlannedRun()
    module, rows = causal_lm(model_folder(place), **task), gsm8k(place, 8, 512, **data)
    clock, _ = fit(place, module, rows, _steps(place), [watch], **options)
    found = {"measured seconds": watch.measured["seconds"], "measured GiB": (watch.measured["peak_bytes"] or 0) / 2**30}
    found["ms a micro-batch"] = round(clock.milliseconds(), 1)
    return found | _context(place)


def _steps(place: Place) -> int:
    return place.pick(20, 4)


def _context(place: Place) -> dict[str, float]:
    """GiB that the allocator keeps at the peak, and that the device holds beside it: CUDA's context and libraries."""
    if place.dry:
        return {}
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return {
        "peak reserved GiB": torch.cuda.max_memory_reserved() / 2**30,
        "beside the allocator GiB": (total - free - reserved) / 2**30,
    }
