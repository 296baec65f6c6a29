"""Merging an adapter into a checkpoint on disk: a few rows at a time, without building the model.

Whatever the size of a tensor, a block of it is in memory; so are the factors of the adapter.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.adapter_folder import read_adapter_folder, read_json
from lightning_lora.atomic import atomic_folder, sha256
from lightning_lora.base_check import BaseCheck
from lightning_lora.errors import AdapterFileError, ConfigError
from lightning_lora.functional import merged_weight
from lightning_lora.in_order import Workers, workers
from lightning_lora.merge_certificate import (
    BlockError,
    LayerCertificate,
    MergeCertificate,
    block_error,
    layer_certificate,
)
from lightning_lora.merge_plan import MergePlan, plan_merge
from lightning_lora.peft_format import TENSOR_FILE
from lightning_lora.stored_update import BLOCK, RowBlock, StoredUpdate
from lightning_lora.tensor_files import TensorFile, open_tensors, read_header, safetensors_files, write_blocks

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
    with atomic_folder(out, replaces=CERTIFICATE_FILE) as target, workers() as threads:
        merge = _Merge(plan, DTYPES.get(dtype or ""), allow_other_base, threads)
        for file in headers:
            merge.shard(file, target / file.name)
        _copy_others(base, target, dtype)
        certificate = MergeCertificate(str(base), sha256(folder.path / TENSOR_FILE), dtype, tuple(merge.done))
        (target / CERTIFICATE_FILE).write_text(json.dumps(asdict(certificate), indent=2) + "\n")
    return certificate


class _Merge:
    """Merges shard after shard and keeps the error of each tensor."""

    def __init__(self, plan: MergePlan, dtype: torch.dtype | None, allow_other_base: bool, threads: Workers) -> None:
        self.plan = plan
        self.threads = threads
        self.dtype = dtype
        self.check = BaseCheck(plan, active=not allow_other_base)
        self.done: list[LayerCertificate] = []

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
                yield _rounded(name, file.read(name, start, min(start + BLOCK, num_elements)), dtype)

    def _trained(self, file: TensorFile, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        trained, shape = self.plan.folder.trained[self.plan.trained[name]], file.header.tensors[name].shape
        if trained.shape != shape:
            raise AdapterFileError(f"{name}: trained as {tuple(trained.shape)}, in the base {shape}.")
        for block in trained.reshape(-1).split(BLOCK):
            yield _rounded(name, block, dtype)

    def _merged(self, file: TensorFile, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        if not file.dtype(name).is_floating_point or file.dtype(name).itemsize < 2:
            raise AdapterFileError(
                f"{name} is stored as {file.dtype(name)}, quantised: an update cannot be added to codes. Merge into "
                f"the checkpoint it was quantised from."
            )
        shape = file.header.tensors[name].shape
        errors: list[BlockError] = []
        sums = self.threads.map(partial(_sum, name, dtype), self._summands(file, name, self.plan.update(name, shape)))
        for merged, error in sums:
            errors.append(error)
            yield merged
        self.check.close(name)
        self.done.append(layer_certificate(name, errors))

    def _summands(self, file: TensorFile, name: str, update: StoredUpdate) -> Iterator[tuple[Tensor, RowBlock]]:
        check = self.check.part(name, file.header.tensors[name].shape)
        start = 0
        for rows in update.blocks():
            stop = start + rows.shape[0] * rows.shape[1]
            weight = file.read(name, start, stop)
            check.add(weight)
            yield weight.reshape(rows.shape), rows
            start = stop


def _sum(name: str, dtype: torch.dtype, summands: tuple[Tensor, RowBlock]) -> tuple[Tensor, BlockError]:
    """Weight and update summed in float32 and rounded once, to the type that is stored."""
    weight, update = summands[0], summands[1].compute()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    merged = _rounded(name, merged_weight(wide, update.to(wide.dtype)), dtype)
    return merged, block_error(weight, update, merged)


def _rounded(name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    """A block in the type that is stored."""
    stored = block.to(dtype)
    if stored is block or torch.promote_types(block.dtype, dtype) == dtype:
        return stored
    limit = torch.finfo(dtype).max
    low, high = block.aminmax()
    if -limit <= float(low) and float(high) <= limit:
        return stored
    # Above the limit some values still round down to it, and what is not finite in the base may stay so.
    finite = block[torch.isfinite(block)]
    if not bool(torch.isfinite(finite.to(dtype)).all()):
        raise AdapterFileError(
            f"{name} reaches {float(finite.abs().max()):g}, more than {dtype} can hold. Choose a wider dtype."
        )
    return stored


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
