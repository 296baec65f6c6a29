"""Merging an adapter into a checkpoint on disk: a few rows at a time, without building the model.

One block of a tensor is in memory at a time, whatever the size of the tensor, and the factors of the adapter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFolderError, AdapterStateError, check_choice
from lightning_lora.files.adapter.folder import read_adapter_folder
from lightning_lora.files.adapter.peft_format import TENSOR_FILE
from lightning_lora.files.atomic import atomic_folder, sha256
from lightning_lora.files.generation_config import add_stops, stops_of
from lightning_lora.files.merge.base_check import BaseCheck
from lightning_lora.files.merge.beside_weights import copy_others, update_config, update_index
from lightning_lora.files.merge.plan import MergePlan, plan_merge
from lightning_lora.files.merge.rounding import BlockError, merged_block, rounded_block, sum_dtype, tensor_error
from lightning_lora.files.merge.row_blocks import BLOCK
from lightning_lora.files.merge.tied_tensors import equal_tensors
from lightning_lora.files.safetensors_file import TensorFile, open_tensors, safetensors_files, write_blocks
from lightning_lora.files.safetensors_header import read_header
from lightning_lora.files.scratch import Scratch
from lightning_lora.lora.reports import MergeReport

CERTIFICATE_FILE = "merge_certificate.json"
MERGE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_files(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    dtype: str | None = None,
    allow_other_base: bool = False,
    end_tokens: Sequence[int] = (),
) -> MergeReport:
    """Write ``base`` with ``adapter`` folded in to ``out``, shard by shard; the base is only read, and once.

    A tokenizer in the adapter's folder takes the place of the base's.

    Args:
        base: Folder of a Hugging Face checkpoint in safetensors.
        adapter: An adapter folder, ours or PEFT's.
        out: The folder to write; appears whole or not at all.
        dtype: Type of all weights in ``out``: ``"float32"``, ``"bfloat16"`` or ``"float16"``. None: each keeps its own.
        allow_other_base: Merge even if the weights are not those the adapter was trained on.
        end_tokens: Ids at which generation is to stop too, beside those of the base and of the adapter's folder.

    Returns:
        The rounding errors, which are also written to ``merge_certificate.json`` in ``out``.

    Raises:
        AdapterFileError: If a file is damaged, the adapter does not fit the base, or a weight does not fit ``dtype``.
        BaseMismatchError: If the adapter was trained on other weights.
        ConfigError: If ``dtype`` is unknown, or ``out`` lies inside ``base``.
    """
    base, out = Path(base), Path(out)
    if dtype is not None:
        check_choice("dtype", dtype, MERGE_DTYPES, AdapterStateError)
    # Not resolve(), which fails on a link to itself.
    place = Path(os.path.realpath(out))
    if base.resolve() in (place, *place.parents):
        raise AdapterStateError(f"{out} is the base or lies inside it; the base is never written to.")
    folder = read_adapter_folder(adapter)
    files = safetensors_files(base)
    stops_of(base)  # of a damaged file, told with its name
    headers = {file: read_header(file) for file in dict.fromkeys(files.values())}
    shapes = {name: headers[file].tensors[name].shape for name, file in files.items()}
    plan = plan_merge(folder, base, shapes, lambda one, two: equal_tensors(files, one, two))
    with atomic_folder(out, replaces=CERTIFICATE_FILE) as target, _one_thread():
        merge = _Merge(plan, MERGE_DTYPES.get(dtype or ""), allow_other_base)
        for file in headers:
            merge.write_shard(file, target / file.name)
        copy_others(base, folder.path, target)
        update_index(target, dtype, plan.tied)
        update_config(target, dtype, plan.tied)
        add_stops(target, [*stops_of(folder.path), *end_tokens])
        report = MergeReport(merge.losses, merge.max_errors, str(base), sha256(folder.path / TENSOR_FILE), dtype)
        write_certificate(target, report)
    return report


def write_certificate(folder: Path, report: MergeReport) -> None:
    """Write ``merge_certificate.json``, by which a later merge knows that the folder may be replaced."""
    layers = [
        {"weight": name, "max_error": report.max_errors.get(name), "delta_error": loss}
        for name, loss in report.losses.items()
    ]
    content = {"base": report.base, "adapter_sha256": report.adapter_sha256, "dtype": report.dtype, "layers": layers}
    (folder / CERTIFICATE_FILE).write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def _one_thread() -> Generator[None, None, None]:
    """Let torch compute in one thread. On blocks, more threads gain little, and all wait where one core is busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class _Merge:
    """Merges one shard after the other, and keeps the errors of each tensor."""

    def __init__(self, plan: MergePlan, dtype: torch.dtype | None, allow_other_base: bool) -> None:
        self.plan = plan
        self.dtype = dtype
        self.check = BaseCheck(plan, active=not allow_other_base)
        # Merged tensor to the share of its update that rounding took, and to the largest error.
        self.losses: dict[str, float] = {}
        self.max_errors: dict[str, float] = {}
        self.scratch = Scratch()

    def write_shard(self, source: Path, target: Path) -> None:
        """Write one file with the updates of its tensors folded in."""
        with open_tensors(source) as file:
            spans = file.header.tensors
            sources = self.plan.tensors(spans)
            layout = {name: (self._dtype(file.dtype(stored)), spans[stored].shape) for name, stored in sources.items()}
            in_order = sorted(sources, key=lambda name: spans[sources[name]].start)
            blocks = ((name, block) for name in in_order for block in self._blocks(file, name, layout[name][0]))
            write_blocks(target, blocks, layout, file.header.metadata)

    def _dtype(self, stored: torch.dtype) -> torch.dtype:
        # One-byte floating-point types hold codes that mean nothing without their scales.
        return self.dtype if self.dtype and stored.is_floating_point and stored.itemsize > 1 else stored

    def _blocks(self, file: TensorFile, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        if self.plan.weight(name) is not None:
            yield from self._merged(file, name, dtype)
        elif name in self.plan.trained:
            yield from self._trained(file, name, dtype)
        else:
            num_elements = torch.Size(self._shape(file, name)).numel()
            for start in range(0, num_elements, BLOCK):
                stop = min(start + BLOCK, num_elements)
                yield rounded_block(name, self._read(file, name, start, stop), dtype, self.scratch)

    def _read(self, file: TensorFile, name: str, start: int, stop: int) -> Tensor:
        """Elements of a weight before its update is added."""
        stored = self.plan.tied.sources.get(name, name)
        if name not in self.plan.copies:
            return file.read(stored, start, stop, self.scratch)
        copy = self.plan.folder.base_copies[self.plan.copies[name]]
        return copy.reshape(-1)[start:stop].to(file.dtype(stored), copy=True)

    def _shape(self, file: TensorFile, name: str) -> tuple[int, ...]:
        return file.header.tensors[self.plan.tied.sources.get(name, name)].shape

    def _trained(self, file: TensorFile, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        trained, shape = self.plan.folder.trained[self.plan.trained[name]], self._shape(file, name)
        if trained.shape != shape:
            raise AdapterFolderError(f"{name}: trained as {tuple(trained.shape)}, in the base {shape}.")
        for block in trained.reshape(-1).split(BLOCK):
            yield rounded_block(name, block, dtype, self.scratch)

    def _merged(self, file: TensorFile, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        stored = file.dtype(self.plan.tied.sources.get(name, name))
        if not stored.is_floating_point or stored.itemsize < 2:
            raise AdapterFolderError(
                f"{name} is stored as {stored}, quantised: an update cannot be added to codes. Merge into "
                f"the checkpoint it was quantised from."
            )
        shape = self._shape(file, name)
        check = self.check.part(name, shape)
        errors: list[BlockError] = []
        start = 0
        whole = self.plan.update(name, shape).with_ratio(partial(self._read, file, name))
        for update in whole.blocks(sum_dtype(stored, dtype)):
            stop = start + torch.Size(update.shape).numel()
            weight = self._read(file, name, start, stop)
            check.add(weight)
            merged, error = merged_block(name, weight.view(update.shape), update, dtype, self.scratch)
            errors.append(error)
            yield merged
            start = stop
        self.check.finish(name)
        self.max_errors[name], self.losses[name] = tensor_error(errors)
