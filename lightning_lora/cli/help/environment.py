"""``lightning-lora env``: what a maintainer needs to know of a machine, to paste into an issue."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

from lightning_lora.versions import installed_version

_PACKAGES = (
    *("lightning-lora", "lightning", "torch", "transformers", "jsonargparse", "safetensors", "torchmetrics"),
    *("datasets", "peft", "triton", "flash-attn", "bitsandbytes", "torchao", "accelerate", "deepspeed", "vllm"),
    *("torchdata", "optuna"),
)
# Beginnings of environment variables that change what a run does.
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "LIGHTNING_LORA_", "NCCL_", "OMP_NUM_THREADS", "PYTORCH_")


def environment() -> str:
    """Versions, devices and settings of this machine, a line each; nothing that names its user or its folders."""
    return "\n".join(f"{name:<16} {value}" for name, value in _facts())


def _facts() -> Iterator[tuple[str, object]]:
    import torch

    from lightning_lora.planning.devices import machine_memory

    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "python", platform.python_version()
    for name in _PACKAGES:
        if (version := installed_version(name)) != "not installed" or name == "lightning-lora":
            yield name, version
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    yield "torch-build", next((f"{name} {version}" for name, version in builds.items() if version), "cpu")
    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"
    if hasattr(os, "sysconf"):  # not on Windows
        yield "memory", f"{machine_memory() / 2**30:.1f} GiB"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"gpu {index}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB, sm_{device.major}{device.minor}"
    for name in sorted(os.environ):
        if name.startswith(_VARIABLES):
            yield name, os.environ[name]
