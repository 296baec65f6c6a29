"""An adapter folder as read from disk, verified before anything else looks at it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFileError, ConfigError, first_five
from lightning_lora.files.adapter import peft_experts, peft_format, peft_layers
from lightning_lora.files.adapter.peft_patterns import TargetedNames
from lightning_lora.files.atomic import sha256
from lightning_lora.files.safetensors_file import read_tensors
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import factor_owner
from lightning_lora.lora.layers.base import FACTORS, WeightShape

Pair = tuple[Tensor, Tensor]

MANIFEST_FILE = "lightning_lora.json"
FORMAT = 1
_JSON_LIMIT = 64 * 2**20


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder holds.

    Args:
        path: The folder.
        peft: Contents of ``adapter_config.json``.
        manifest: Contents of ``lightning_lora.json``, or None for a folder written by PEFT.
        config: The settings of the adapter.
        ranks: Adapted weight to rank.
        factors: Adapter tensors by the names this package uses, ``<module>.lora_A``.
        packed: Factors of fused experts as PEFT lays them out, by its module names: only the model knows what they are.
        trained: Tensors of modules trained in full, by parameter name.
        tables: Names of the adapted modules that are embeddings.
        following: Layers that use the update of the layer they share their weight with.
        base_copies: Unchanged base weights that PEFT stores beside adapted embeddings, by parameter name.
    """

    path: Path
    peft: dict[str, Any]
    manifest: dict[str, Any] | None
    config: LoRAConfig
    ranks: dict[str, int]
    factors: dict[str, Tensor]
    packed: dict[str, Pair]
    trained: dict[str, Tensor]
    following: tuple[str, ...]
    base_copies: dict[str, Tensor]
    tables: frozenset[str]

    @property
    def shapes(self) -> dict[str, WeightShape]:
        """Adapted weight to the shape its factors have."""
        return {
            name: WeightShape(A.shape[-1], B.shape[-2], max(A.shape[0], B.shape[0]) if A.ndim == 3 else 0)
            for name, (A, B) in self.pairs.items()
        }

    def with_factors(self, factors: Mapping[str, Tensor]) -> AdapterFolder:
        """The same folder, its packed factors replaced by ``factors``.

        Raises:
            AdapterFileError: If their ranks are not those of the config.
        """
        every = self.factors | dict(factors)
        ranks = {name: A.shape[-2] for name, (A, _) in _pairs(every, self.path).items()}
        peft_format.check_ranks(self.peft, ranks, str(self.path))
        config = peft_format.to_lora_config(self.peft, ranks, self.config.trainable)
        return replace(self, factors=every, ranks=ranks, config=config, packed={})

    @property
    def pairs(self) -> dict[str, Pair]:
        """Adapted weight to its ``A`` and ``B``."""
        return _pairs(self.factors, self.path)


def read_adapter_folder(path: str | Path) -> AdapterFolder:
    """Read and verify a PEFT-format folder; only JSON and safetensors are ever opened.

    Raises:
        AdapterFileError: If a file is missing, damaged, changed since it was written, or of an unsupported kind.
    """
    folder = Path(path)
    _check_files(folder)
    manifest = read_json(folder / MANIFEST_FILE) if (folder / MANIFEST_FILE).is_file() else None
    if manifest is not None:
        verify_manifest(folder, manifest)
    peft = read_json(folder / peft_format.CONFIG_FILE)
    peft_format.check_supported(peft, str(folder / peft_format.CONFIG_FILE))
    tensor_file = folder / peft_format.TENSOR_FILE
    tensors = read_tensors(tensor_file)
    factors, trained, base_copies = _split(tensors, tensor_file)
    tables = frozenset(module for name in tensors if (module := peft_format.table_of(name)) is not None)
    factors, projections = peft_layers.take_projections(factors)
    if manifest is not None:
        _check_layers(folder, manifest)
        factors = peft_layers.without_fillers(factors, manifest)
    factors = peft_layers.unpack(factors, manifest, projections, str(peft.get("peft_version", "")))
    following = tuple(manifest.get("following", ())) if manifest is not None else ()
    factors = {name: tensor for name, tensor in factors.items() if factor_owner(name)[0] not in following}
    packed: dict[str, Pair] = {}
    if peft.get("target_parameters"):
        packed = peft_experts.take_packed(factors, manifest, TargetedNames(peft))
    if manifest is not None:
        factors |= peft_experts.unpack_by_manifest(packed, manifest, str(tensor_file))
        packed = {}
    ranks = {name: A.shape[-2] for name, (A, _) in _pairs(factors, tensor_file).items()}
    if manifest is not None and {name: layer["rank"] for name, layer in manifest["layers"].items()} != ranks:
        raise AdapterFileError(_unsound(folder))
    try:
        peft = peft_layers.with_patterns(peft, projections, manifest)
        peft_format.check_ranks(peft, ranks, str(folder))
        if manifest is None:
            config = peft_format.to_lora_config(peft, ranks, _modules(trained))
        else:
            config = LoRAConfig.from_dict(manifest["config"])
            alphas = {name: layer["alpha"] for name, layer in manifest["layers"].items()}
            peft_format.check_scales(peft, alphas, config, str(folder))
    except AdapterFileError:
        raise
    except (ConfigError, ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise AdapterFileError(f"{folder} holds settings that cannot be used: {error}") from error
    return AdapterFolder(
        folder, peft, manifest, config, ranks, factors, packed, trained, following, base_copies, tables
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 64 MiB.

    Raises:
        AdapterFileError: If the file is not that.
    """
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise AdapterFileError(f"{path} is larger than {_JSON_LIMIT} bytes, which no adapter setting needs.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} must hold a JSON object, found {type(content).__name__}.")
    return content


def verify_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file with the size and SHA-256 written when it was saved.

    Raises:
        AdapterFileError: Naming the file, what was expected and what was found.
    """
    files = manifest.get("files")
    written = (peft_format.CONFIG_FILE, peft_format.TENSOR_FILE)
    if (
        not isinstance(manifest.get("format"), int)
        or not isinstance(files, dict)
        or not all(isinstance(files.get(name), dict) for name in written)
        or not all({"bytes", "sha256"} <= entry.keys() for entry in files.values())
    ):
        raise AdapterFileError(
            f"{folder / MANIFEST_FILE} is not a lightning-lora manifest; delete it to load the rest."
        )
    if manifest["format"] > FORMAT:
        raise AdapterFileError(
            f"{folder} has manifest format {manifest['format']}, newer than {FORMAT}: update lightning-lora."
        )
    for name, expected in files.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise AdapterFileError(f"{folder} lacks {name!r}, which its manifest lists.")
        if file.stat().st_size != expected["bytes"]:
            raise AdapterFileError(
                f"{file} is incomplete or changed: expected {expected['bytes']} bytes, found {file.stat().st_size}."
            )
        if sha256(file) != expected["sha256"]:
            raise AdapterFileError(f"{file} was changed after it was saved: its SHA-256 is not the manifest's.")


def _check_layers(folder: Path, manifest: Mapping[str, Any]) -> None:
    """The manifest must hold what is needed to describe the tensors it lies beside."""
    layers = manifest.get("layers")
    sound = (
        isinstance(layers, dict)
        and isinstance(manifest.get("config"), dict)
        and isinstance(manifest.get("base_fingerprint"), str)
        and all(
            isinstance(layer, dict) and {"rank", "alpha", "parameter", "base"} <= layer.keys()
            for layer in layers.values()
        )
        and all(isinstance(layer["alpha"], (int, float)) and layer["alpha"] > 0 for layer in layers.values())
    )
    if not sound:
        raise AdapterFileError(_unsound(folder))


def _unsound(folder: Path) -> str:
    return f"{folder / MANIFEST_FILE} does not describe the tensors beside it; delete it to load the rest."


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `AdapterFileError` if a tensor is empty or holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise AdapterFileError(f"{where}: {name} is empty, shape {tuple(tensor.shape)}.")
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise AdapterFileError(f"{where}: {name} holds {bad} NaN or infinite values of {tensor.numel()}.")


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "absent"
        raise AdapterFileError(f"{folder} is {kind}; an adapter is a folder with {peft_format.CONFIG_FILE}.")
    if not (folder / peft_format.CONFIG_FILE).is_file():
        held = first_five(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise AdapterFileError(f"{folder} is not an adapter: it has no {peft_format.CONFIG_FILE}, only {held}.")
    if not (folder / peft_format.TENSOR_FILE).is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise AdapterFileError(
                f"{folder} holds only {pickled[0]}, a pickle, which can run code and is never opened. Load it in PEFT "
                f"where you trust it and save it again as safetensors."
            )
        raise AdapterFileError(f"{folder} has no {peft_format.TENSOR_FILE}.")


def _split(
    tensors: Mapping[str, Tensor], where: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    factors, trained, base_copies = {}, {}, {}
    for name, tensor in tensors.items():
        module, factor = peft_format.split_tensor_name(name)
        if factor is None and module.endswith(".base_layer.weight"):
            base_copies[module.replace(".base_layer.", ".")] = tensor
        elif factor is None:
            trained[module] = tensor
        else:
            factors[f"{module}.{factor}" if module else factor] = tensor
    if not factors:
        raise AdapterFileError(f"{where} holds no adapter tensors.")
    check_finite(factors | trained, str(where))
    return factors, trained, base_copies


def _pairs(factors: Mapping[str, Tensor], where: Path) -> dict[str, Pair]:
    """Adapted weight to its two factors, which must fit each other."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in factors.items():
        name, factor = factor_owner(key)
        found.setdefault(name, {})[factor] = tensor
    pairs = {}
    for name, pair in found.items():
        A, B = pair.get("lora_A"), pair.get("lora_B")
        if A is None or B is None or A.ndim != B.ndim or A.ndim not in (2, 3) or A.shape[-2] != B.shape[-1]:
            shapes = ", ".join(f"{f[-1]} {tuple(pair[f].shape) if f in pair else 'missing'}" for f in FACTORS)
            raise AdapterFileError(f"{where}: the factors of {name!r} do not fit: {shapes}.")
        pairs[name] = (A, B)
    return pairs


def _modules(trained: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in trained))
