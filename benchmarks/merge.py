"""Memory and speed of merging on disk, beside a plain copy of the same files.

    python -m benchmarks.merge --dtype bfloat16 --folder /tmp

Writes a checkpoint of several shards, an adapter of all its matrices, and merges them in a process of its own. Memory
is the peak of the whole resident set (VmHWM, file pages included: no file is mapped, so there is nothing to leave out)
above what the process holds once everything is imported. Each timing starts with a synced disk and ends with one;
what is read may come from the page cache, for the copy as for the merge.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.machine import load, machine

WIDTH = 8_192
MERGE = """
import json, sys, time
import torch
from lightning_lora.files.merge.merge_files import merge_files
from lightning_lora.memory.process_peak import peak_bytes, resident_bytes, restart_peak

cpu = torch.device("cpu")
restart_peak(cpu)  # what importing took at its peak does not count
before, start = resident_bytes(), time.perf_counter()
merge_files(*sys.argv[1:])
print(json.dumps({"seconds": time.perf_counter() - start, "bytes": peak_bytes(cpu) - before}))
"""


def write_base(folder: Path, dtype: torch.dtype, largest: int, num_shards: int) -> list[str]:
    """Shards of two matrices, ``largest`` bytes and half of that; names of all."""
    folder.mkdir()
    shards: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        tensors = {}
        for name, size in (("up_proj", largest), ("down_proj", largest // 2)):
            rows = size // dtype.itemsize // WIDTH
            tensors[f"layers.{shard}.mlp.{name}.weight"] = torch.randn(rows, WIDTH).mul_(0.02).to(dtype)
        save_file(tensors, folder / file, {"format": "pt"})
        shards |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return list(shards)


def write_adapter(folder: Path, base: Path, names: list[str], rank: int) -> None:
    """An adapter of all the matrices, as PEFT writes one."""
    from lightning_lora.files.safetensors_file import safetensors_files
    from lightning_lora.files.safetensors_header import read_header

    folder.mkdir()
    tensors, files = {}, safetensors_files(base)
    for name in names:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        rows, columns = read_header(files[name]).tensors[name].shape
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns) / columns**0.5
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def merge(base: Path, adapter: Path, out: Path, dtype: str | None = None) -> dict[str, float]:
    """Seconds and bytes of one merge."""
    arguments = [str(base), str(adapter), str(out), *([dtype] if dtype else [])]
    done = subprocess.run([sys.executable, "-c", MERGE, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def copy(base: Path, out: Path) -> float:
    """Seconds of copying the base, to the disk and not only to the page cache."""
    start = time.perf_counter()
    out.mkdir()
    for file in base.iterdir():
        shutil.copyfile(file, out / file.name)
        with open(out / file.name, "rb") as written:
            os.fsync(written.fileno())
    return time.perf_counter() - start


def afresh(run: Callable[[], None], out: Path) -> None:
    """Run with nothing of an earlier run on the disk or on the way to it."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--largest", type=int, default=256, help="size of the largest tensor, MB")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; needs three times the checkpoint")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        base, adapter, out = (Path(temporary) / name for name in ("base", "adapter", "out"))
        names = write_base(base, getattr(torch, arguments.dtype), arguments.largest * 2**20, arguments.shards)
        write_adapter(adapter, base, names, arguments.rank)
        size = sum(file.stat().st_size for file in base.iterdir())
        copies: list[float] = []
        merges: list[dict[str, float]] = []
        for _ in range(arguments.repetitions):
            afresh(lambda: copies.append(copy(base, out)), out)
            afresh(lambda: merges.append(merge(base, adapter, out)), out)
    seconds = statistics.median(run["seconds"] for run in merges)
    copied = statistics.median(copies)
    memory = max(run["bytes"] for run in merges) / 2**20
    allowed = 4 * arguments.largest + 200
    print(json.dumps(machine(torch.device("cpu")) | {"load": load()}))
    print(f"{arguments.dtype}, {size / 2**20:.0f} MB in {arguments.shards} shards, largest {arguments.largest} MB")
    print(f"merge {seconds:.2f} s ({size / seconds / 2**20:.0f} MB/s), copy {copied:.2f} s ({seconds / copied:.2f} x)")
    print(f"peak memory {memory:.0f} MB above the imports; 4 x largest + 200 MB are {allowed} MB")


if __name__ == "__main__":
    main()
