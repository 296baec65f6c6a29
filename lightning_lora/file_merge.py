"""Merging an adapter into a checkpoint on disk: tensor by tensor, without building the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_lora.adapter_folder import AdapterFolder, read_adapter_folder, read_json
from lightning_lora.atomic import atomic_folder, sha256
from lightning_lora.errors import AdapterFileError, BaseMismatchError, ConfigError, first_five
from lightning_lora.fingerprint import tensor_digest
from lightning_lora.functional import merged_weight, weight_update
from lightning_lora.peft_format import TENSOR_FILE
from lightning_lora.tensor_files import read_header, safetensors_files, write_tensors

CERTIFICATE_FILE = "merge_certificate.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class LayerCertificate:
    """Numeric error of one merged layer.

    Args:
        weight: Name of the merged tensor in the base checkpoint.
        max_error: Largest difference between the exact sum and what was stored, in weight units.
        delta_error: ``|stored change - exact change| / |exact change|``: what rounding took of the update.
    """

    weight: str
    max_error: float
    delta_error: float


@dataclass(frozen=True)
class MergeCertificate:
    """What a merge did: inputs by hash, type of the output, error of each layer."""

    base: str
    adapter_sha256: str
    dtype: str | None
    layers: tuple[LayerCertificate, ...]

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: layer.delta_error)
        error = max(layer.max_error for layer in self.layers)
        return (
            f"{len(self.layers)} layers merged in float32; rounding to the stored type changed a weight by at most "
            f"{error:.2e} and took at most {worst.delta_error:.2%} of an update ({worst.weight})"
        )


def merge_files(
    base: str | Path, adapter: str | Path, out: str | Path, dtype: str | None = None, allow_other_base: bool = False
) -> MergeCertificate:
    """Write ``base`` with ``adapter`` folded in to ``out``, shard by shard; the base is only read.

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
    merge = _Merge(folder, base, set(files), DTYPES.get(dtype or ""), allow_other_base)
    with atomic_folder(out, replaces=CERTIFICATE_FILE) as target:
        for file in dict.fromkeys(files.values()):
            merge.shard(file, target / file.name)
        _copy_others(base, target, dtype)
        certificate = MergeCertificate(str(base), sha256(folder.path / TENSOR_FILE), dtype, tuple(merge.done))
        (target / CERTIFICATE_FILE).write_text(json.dumps(asdict(certificate), indent=2) + "\n")
    return certificate


class _Merge:
    """Merges shard after shard and keeps the error of each layer."""

    def __init__(
        self, folder: AdapterFolder, base: Path, names: set[str], dtype: torch.dtype | None, allow_other_base: bool
    ) -> None:
        self.folder = folder
        # Tensor in the base -> adapted layer, and -> tensor trained in full.
        self.layers, self.trained = _targets(folder, names, base)
        self.pairs = folder.pairs
        self.dtype = dtype
        self.allow_other_base = allow_other_base
        self.done: list[LayerCertificate] = []

    def shard(self, source: Path, target: Path) -> None:
        """Write one file with the updates of its tensors folded in."""
        header = read_header(source)
        with safe_open(source, framework="pt") as tensors:
            names = list(header.tensors)
            layout = {name: self._layout(tensors, name) for name in names}
            write_tensors(target, self._merged(tensors, names), layout, header.metadata)

    def _layout(self, tensors: Any, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        piece = tensors.get_tensor(name)
        return (self.dtype if self.dtype and piece.is_floating_point() else piece.dtype), tuple(piece.shape)

    def _merged(self, tensors: Any, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            tensor = tensors.get_tensor(name)
            dtype = self.dtype if self.dtype and tensor.is_floating_point() else tensor.dtype
            if name in self.layers:
                tensor = self._merge(name, tensor, dtype)
            elif name in self.trained:
                tensor = self._trained(name, tensor)
            yield name, _stored(name, tensor, dtype)

    def _trained(self, name: str, weight: Tensor) -> Tensor:
        trained = self.folder.trained[self.trained[name]]
        if trained.shape != weight.shape:
            raise AdapterFileError(f"{name}: trained as {tuple(trained.shape)}, in the base {tuple(weight.shape)}.")
        return trained

    def _merge(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        layer = self.layers[name]
        manifest = self.folder.manifest
        if manifest is not None and not self.allow_other_base:
            expected = manifest["layers"][layer]["base"]
            if tensor_digest(weight) != expected:
                raise BaseMismatchError(
                    f"{name} is not the weight the adapter was trained on (digest {tensor_digest(weight)}, expected "
                    f"{expected}). Give the right base, or pass --allow_other_base."
                )
        delta = self._delta(layer, weight)
        # Summed in float32 and rounded once, to the type that is stored.
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        merged = _stored(name, merged_weight(wide, delta.to(wide.dtype)), dtype)
        exact = weight.double() + delta
        norm = delta.norm()
        lost = (merged.double() - exact).norm() / norm if norm else torch.tensor(0.0)
        self.done.append(LayerCertificate(name, float((merged.double() - exact).abs().max()), float(lost)))
        return merged

    def _delta(self, layer: str, weight: Tensor) -> Tensor:
        A, B = self.pairs[layer]
        delta = weight_update(A.double(), B.double(), self._scale(layer))
        square = delta.shape[0] == delta.shape[1]
        # Embeddings and GPT-2's Conv1D store the transpose; where the weight is square the config tells the latter.
        transposed = layer in self.folder.tables or (square and self.folder.peft.get("fan_in_fan_out"))
        if transposed or delta.shape != weight.shape:
            delta = delta.T
        if delta.shape != weight.shape:
            raise AdapterFileError(f"{layer}: the update is {tuple(delta.shape)}, the weight {tuple(weight.shape)}.")
        return delta

    def _scale(self, layer: str) -> float:
        config, manifest = self.folder.config, self.folder.manifest
        alpha = (
            config.alpha_pattern.get(layer, config.alpha) if manifest is None else manifest["layers"][layer]["alpha"]
        )
        return config.scale(self.folder.ranks[layer], alpha)


def _targets(folder: AdapterFolder, names: set[str], base: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Base tensor to adapted layer, and base tensor to tensor trained in full."""
    parameters = {
        layer: f"{layer}.weight" if folder.manifest is None else folder.manifest["layers"][layer]["parameter"]
        for layer in folder.ranks
    }
    layers = {layer: _in_base(parameter, names) for layer, parameter in parameters.items()}
    trained = {name: _in_base(name, names) for name in folder.trained}
    missing = [layer for layer, found in layers.items() if found is None]
    # A checkpoint holds tied weights once, an adapter that trained them under each name.
    kept = [folder.trained[name] for name, found in trained.items() if found is not None]
    missing += [
        name
        for name, found in trained.items()
        if found is None and not any(torch.equal(folder.trained[name], tensor) for tensor in kept)
    ]
    if missing:
        hint = (
            " Checkpoints store fused experts one by one: load the model, load_adapter() and save it merged instead."
            if folder.packed or any(shape.num_experts for shape in folder.shapes.values())
            else ""
        )
        raise AdapterFileError(
            f"{folder.path} does not fit {base}: {len(missing)} of {len(folder.ranks) + len(folder.trained)} adapted "
            f"weights are not in the checkpoint: {first_five(missing)}.{hint}"
        )
    return (
        {found: layer for layer, found in layers.items() if found is not None},
        {found: name for name, found in trained.items() if found is not None},
    )


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    stored = tensor.to(dtype)
    if tensor.is_floating_point() and not torch.isfinite(stored).all() and torch.isfinite(tensor).all():
        raise AdapterFileError(
            f"{name} reaches {float(tensor.abs().max()):g}, more than {dtype} can hold. Choose a wider dtype."
        )
    return stored


def _in_base(name: str, names: set[str]) -> str | None:
    """The name in the checkpoint, which may leave out the first part of the names a model uses."""
    return next((candidate for candidate in (name, name.partition(".")[2]) if candidate in names), None)


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
