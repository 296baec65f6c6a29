"""Merging an adapter into a checkpoint on disk: a few rows at a time, without building the model.

Whatever the size of a tensor, a block of it is in memory; so are the factors of the adapter.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFileError, ConfigError
from lightning_lora.files.adapter.folder import read_adapter_folder, read_json
from lightning_lora.files.adapter.peft_format import TENSOR_FILE
from lightning_lora.files.atomic import atomic_folder, sha256
from lightning_lora.files.merge.base_check import BaseCheck
from lightning_lora.files.merge.certificate import (
    BlockError,
    LayerCertificate,
    MergeCertificate,
    block_error,
    layer_certificate,
)
from lightning_lora.files.merge.plan import MergePlan, plan_merge
from lightning_lora.files.merge.row_blocks import BLOCK, RowBlock
from lightning_lora.files.safetensors_file import TensorFile, open_tensors, read_header, safetensors_files, write_blocks
from lightning_lora.files.scratch import Scratch

CERTIFICATE_FILE = "merge_certificate.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def merge_files(
    base: str | Path, adapter: str | Path, out: str | Path, dtype: str | None = None, allow_other_base: bool = False
) -> MergeCertificate:
    """Write ``base`` with ``adapter`` folded in to ``out``, shard by shard; the base is only read, and once.

    Args:
        base: Folder of a Hugging Face checkpoint in safetensors.
        adapter: An adapter folder, ours or PEFT's.
        out: The folder to write; appears whole or not at all.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"`` for all weights. None: each keeps its own.
        allow_other_base: Merge even though the weights are not those the adapter was trained on.

    Raises:
        AdapterFileError: If a file is damaged, the adapter does not fit the base, or a weight does not fit ``dtype``.
        BaseMismatchError: If the adapter was trained on other weights.
        ConfigError: If ``dtype`` is unknown, or ``out`` lies inside ``base``.
    """
    base, out = Path(base), Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if out.resolve() == base.resolve() or base.resolve() in out.resolve().parents:
        raise ConfigError(f"{out} is the base or lies inside it; the base is never written to.")
    folder = read_adapter_folder(adapter)
    files = safetensors_files(base)
    headers = {file: read_header(file) for file in dict.fromkeys(files.values())}
    plan = plan_merge(folder, base, {name: headers[file].tensors[name].shape for name, file in files.items()})
    with atomic_folder(out, replaces=CERTIFICATE_FILE) as target, _one_thread():
        merge = _Merge(plan, DTYPES.get(dtype or ""), allow_other_base)
        for file in headers:
            merge.shard(file, target / file.name)
        _copy_others(base, target, dtype)
        certificate = MergeCertificate(str(base), sha256(folder.path / TENSOR_FILE), dtype, tuple(merge.done))
        (target / CERTIFICATE_FILE).write_text(json.dumps(asdict(certificate), indent=2) + "\n")
    return certificate


@contextmanager
def _one_thread() -> Generator[None, None, None]:
    """Let torch compute in one thread: others gain little on a block, and where a core is busy all wait for it."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class _Merge:
    """Merges shard after shard and keeps the error of each tensor."""

    def __init__(self, plan: MergePlan, dtype: torch.dtype | None, allow_other_base: bool) -> None:
        self.plan = plan
        self.dtype = dtype
        self.check = BaseCheck(plan, active=not allow_other_base)
        self.done: list[LayerCertificate] = []
        self.scratch = Scratch()

    def shard(self, source: Path, target: Path) -> None:
        """Write one file with the updates of its tensors folded in."""
        with open_tensors(source) as file:
            spans = file.header.tensors
            layout = {name: (self._dtype(file.dtype(name)), span.shape) for name, span in spans.items()}
            in_order = sorted(spans, key=lambda name: spans[name].start)
            blocks = ((name, block) for name in in_order for block in self._blocks(file, name, layout[name][0]))
            write_blocks(target, blocks, layout, file.header.metadata)

    def _dtype(self, stored: torch.dtype) -> torch.dtype:
        # Floating-point types of one byte are codes that mean nothing without their scales.
        return self.dtype if self.dtype and stored.is_floating_point and stored.itemsize > 1 else stored

    def _blocks(self, file: TensorFile, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        if self.plan.weight(name) is not None:
            yield from self._merged(file, name, dtype)
        elif name in self.plan.trained:
            yield from self._trained(file, name, dtype)
        else:
            num_elements = torch.Size(file.header.tensors[name].shape).numel()
            for start in range(0, num_elements, BLOCK):
                stop = min(start + BLOCK, num_elements)
                yield _rounded(name, file.read(name, start, stop, self.scratch), dtype, self.scratch)

    def _trained(self, file: TensorFile, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        trained, shape = self.plan.folder.trained[self.plan.trained[name]], file.header.tensors[name].shape
        if trained.shape != shape:
            raise AdapterFileError(f"{name}: trained as {tuple(trained.shape)}, in the base {shape}.")
        for block in trained.reshape(-1).split(BLOCK):
            yield _rounded(name, block, dtype, self.scratch)

    def _merged(self, file: TensorFile, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        if not file.dtype(name).is_floating_point or file.dtype(name).itemsize < 2:
            raise AdapterFileError(
                f"{name} is stored as {file.dtype(name)}, quantised: an update cannot be added to codes. Merge into "
                f"the checkpoint it was quantised from."
            )
        shape = file.header.tensors[name].shape
        check = self.check.part(name, shape)
        errors: list[BlockError] = []
        start = 0
        for update in self.plan.update(name, shape).blocks(_arithmetic(file.dtype(name), dtype)):
            stop = start + torch.Size(update.shape).numel()
            weight = file.read(name, start, stop, self.scratch)
            check.add(weight)
            merged, error = _sum(name, weight.view(update.shape), update, dtype, self.scratch)
            errors.append(error)
            yield merged
            start = stop
        self.check.close(name)
        self.done.append(layer_certificate(name, errors))


def _arithmetic(read: torch.dtype, written: torch.dtype) -> torch.dtype:
    """The type to sum in: twice as wide as what is written, and no narrower than what is read."""
    return torch.promote_types(read, torch.float32 if written.itemsize == 2 else torch.float64)


def _sum(
    name: str, weight: Tensor, update: RowBlock, dtype: torch.dtype, scratch: Scratch
) -> tuple[Tensor, BlockError]:
    """Weight and update summed and rounded once, to the type that is stored."""
    shape, wide = update.shape, update.right.dtype
    exact = scratch.empty("weight", shape, wide).copy_(weight)
    change = update.compute(out=scratch.empty("update", shape, wide))
    total = torch.add(exact, change, out=scratch.empty("sum", shape, wide))
    merged = scratch.empty("written", shape, dtype).copy_(total)
    error = block_error(exact, change, total.copy_(merged))
    if not math.isfinite(error.largest):
        _check_fits(name, weight.to(wide) + change, merged)
    return merged, error


def _rounded(name: str, block: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """A block in the type that is stored."""
    if block.dtype == dtype:
        return block
    stored = scratch.empty("written", tuple(block.shape), dtype).copy_(block)
    if torch.promote_types(block.dtype, dtype) != dtype:
        limit = torch.finfo(dtype).max
        low, high = block.aminmax()
        if not (-limit <= float(low) and float(high) <= limit):
            _check_fits(name, block, stored)
    return stored


def _check_fits(name: str, block: Tensor, stored: Tensor) -> None:
    # Above the limit some values still round down to it, and what is not finite in the base may stay so.
    finite = block.isfinite()
    if not bool(stored[finite].isfinite().all()):
        raise AdapterFileError(
            f"{name} reaches {float(block[finite].abs().max()):g}, more than {stored.dtype} can hold. Choose a wider "
            "dtype."
        )


def _copy_others(base: Path, target: Path, dtype: str | None) -> None:
    for file in base.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.suffix not in _PICKLES:
            shutil.copyfile(file, target / file.name)
    index = target / "model.safetensors.index.json"
    if dtype is not None and index.is_file():
        content = read_json(index)
        headers = [read_header(file) for file in set(safetensors_files(target).values())]
        spans = [span for header in headers for span in header.tensors.values()]
        content["metadata"] = content.get("metadata", {}) | {"total_size": sum(span.end - span.start for span in spans)}
        index.write_text(json.dumps(content, indent=2) + "\n")
    if dtype is not None and (target / "config.json").is_file():
        config = read_json(target / "config.json")
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
