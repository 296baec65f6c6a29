"""An adapter folder as read from disk, verified before anything else uses it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFileError, ConfigError, first_five
from lightning_lora.files.adapter import peft_config, peft_experts, peft_layers
from lightning_lora.files.adapter.manifest import Manifest, read_manifest, undescribed
from lightning_lora.files.adapter.peft_format import (
    CONFIG_FILE,
    TENSOR_FILE,
    FactorPair,
    embedding_of,
    split_tensor_name,
    stored_weight,
)
from lightning_lora.files.adapter.peft_patterns import is_saved_in_full
from lightning_lora.files.json_object import read_json
from lightning_lora.files.safetensors_file import read_tensors
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import factor_owner
from lightning_lora.lora.layers.base import FACTORS, AdapterSpec, WeightShape


@dataclass(frozen=True)
class AdapterFolder:
    """The contents of an adapter folder.

    Args:
        path: The folder.
        peft: Contents of ``adapter_config.json``.
        manifest: Contents of ``lightning_lora.json``; empty for a folder written by PEFT.
        config: The settings of the adapter.
        ranks: Adapted weight to rank.
        factors: Adapter tensors by the names this package uses, ``<module>.lora_A``.
        stacked: Factors of fused experts in PEFT's layout, by its module names. Only the model tells what they are.
        trained: Tensors of modules trained in full, by parameter name.
        base_copies: Base weights that are stored too, as PEFT stores embeddings that were resized, by parameter name.
        embeddings: Names of the adapted modules that are embeddings.
    """

    path: Path
    peft: dict[str, Any]
    manifest: Manifest
    config: LoRAConfig
    ranks: dict[str, int]
    factors: dict[str, Tensor]
    stacked: dict[str, FactorPair]
    trained: dict[str, Tensor]
    base_copies: dict[str, Tensor]
    embeddings: frozenset[str]

    @cached_property
    def pairs(self) -> dict[str, FactorPair]:
        """Adapted weight to its ``A`` and ``B``."""
        return _pairs(self.factors, self.path)

    @property
    def shapes(self) -> dict[str, WeightShape]:
        """Adapted weight to the shape its factors have."""
        return {
            name: WeightShape(A.shape[-1], B.shape[-2], max(A.shape[0], B.shape[0]) if A.ndim == 3 else 0)
            for name, (A, B) in self.pairs.items()
        }

    def spec(self, name: str, role: str = "") -> AdapterSpec:
        """How a weight is adapted; its role is the caller's to say."""
        entry = self.manifest.layers.get(name)
        alpha = self.config.alpha_pattern.get(name, self.config.alpha) if entry is None else entry.alpha
        return AdapterSpec(self.ranks[name], alpha, role, self.config)

    def with_factors(self, factors: Mapping[str, Tensor]) -> AdapterFolder:
        """The same folder with ``factors`` in place of the stacked ones.

        Raises:
            AdapterFileError: If their ranks are not those of the config.
        """
        every = self.factors | dict(factors)
        ranks = _ranks(every, self.path)
        peft_config.check_ranks(self.peft, ranks, str(self.path))
        config = peft_config.to_lora_config(self.peft, ranks, self.config.trainable)
        return replace(self, factors=every, ranks=ranks, config=config, stacked={})


def read_adapter_folder(path: str | Path) -> AdapterFolder:
    """Read and verify a PEFT-format folder; only JSON and safetensors are ever opened.

    Raises:
        AdapterFileError: If a file is missing, damaged, changed since it was written, or of an unsupported kind.
    """
    folder = Path(path)
    _check_files(folder)
    manifest = read_manifest(folder)
    peft = read_json(folder / CONFIG_FILE)
    peft_config.check_supported(peft, str(folder / CONFIG_FILE))
    tensor_file = folder / TENSOR_FILE
    tensors = read_tensors(tensor_file)
    stored, trained, base_copies = _split(tensors, peft, manifest, tensor_file)
    factors, projections = peft_layers.from_peft(stored, manifest, str(peft.get("peft_version", "")))
    factors = {name: tensor for name, tensor in factors.items() if factor_owner(name)[0] not in manifest.following}
    factors, stacked = peft_experts.split_stacked(factors, manifest, peft)
    if manifest.is_present:
        factors, stacked = factors | peft_experts.unstack_by_manifest(stacked, manifest, str(tensor_file)), {}
    ranks = _ranks(factors, tensor_file)
    if manifest.is_present and manifest.ranks != ranks:
        raise undescribed(folder)
    with _usable_settings(folder):
        peft = peft_layers.with_projections(peft, projections, manifest)
        config = _config(folder, manifest, peft, ranks, trained)
    embeddings = frozenset(module for name in tensors if (module := embedding_of(name)) is not None)
    return AdapterFolder(folder, peft, manifest, config, ranks, factors, stacked, trained, base_copies, embeddings)


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
        raise AdapterFileError(f"{folder} is {kind}; an adapter is a folder with {CONFIG_FILE}.")
    if not (folder / CONFIG_FILE).is_file():
        held = first_five(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise AdapterFileError(f"{folder} is not an adapter: it has no {CONFIG_FILE}, only {held}.")
    if not (folder / TENSOR_FILE).is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise AdapterFileError(
                f"{folder} holds only {pickled[0]}, a pickle, which can run code and is never opened. Load it in PEFT "
                f"where you trust it and save it again as safetensors."
            )
        raise AdapterFileError(f"{folder} has no {TENSOR_FILE}.")


def _split(
    tensors: Mapping[str, Tensor], peft: Mapping[str, Any], manifest: Manifest, where: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The factors, the tensors of modules trained in full, and the copies of base weights."""
    factors, trained, base_copies = {}, {}, {}
    for name, tensor in tensors.items():
        module, factor = split_tensor_name(name)
        parameter, kind = stored_weight(module)
        if factor is not None:
            factors[f"{module}.{factor}" if module else factor] = tensor
        elif parameter in manifest.base_copies or (not manifest.is_present and _is_base(parameter, kind, peft)):
            base_copies[parameter] = tensor
        else:
            trained[parameter if kind == "modules_to_save" else module] = tensor
    if not manifest.is_present and peft.get("ensure_weight_tying"):
        # PEFT names one of the tied modules that it trains in full, and stores them all.
        tied = [
            name for name, tensor in base_copies.items() if any(map(partial(torch.equal, tensor), trained.values()))
        ]
        trained |= {name: base_copies.pop(name) for name in tied}
    if not factors:
        raise AdapterFileError(f"{where} holds no adapter tensors.")
    check_finite(factors | trained | base_copies, str(where))
    return factors, trained, base_copies


def _is_base(parameter: str, kind: str, peft: Mapping[str, Any]) -> bool:
    """Whether PEFT stored a parameter of the base, and not one of a module trained in full."""
    in_full = is_saved_in_full(parameter.rpartition(".")[0], peft)
    return kind in ("base_layer", "original_module") or (kind == "" and not in_full)


def _pairs(factors: Mapping[str, Tensor], where: Path) -> dict[str, FactorPair]:
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


def _ranks(factors: Mapping[str, Tensor], where: Path) -> dict[str, int]:
    return {name: A.shape[-2] for name, (A, _) in _pairs(factors, where).items()}


def _config(
    folder: Path, manifest: Manifest, peft: Mapping[str, Any], ranks: Mapping[str, int], trained: Mapping[str, Tensor]
) -> LoRAConfig:
    """The settings of the adapter, after checking that all files agree about them."""
    peft_config.check_ranks(peft, ranks, str(folder))
    if not manifest.is_present:
        return peft_config.to_lora_config(peft, ranks, dict.fromkeys(name.rpartition(".")[0] for name in trained))
    config = LoRAConfig.from_dict(manifest.config)
    peft_config.check_scales(peft, manifest.alphas, config, str(folder))
    return config


@contextmanager
def _usable_settings(folder: Path) -> Iterator[None]:
    """Raise `AdapterFileError` for any error about values in the settings, within the context."""
    try:
        yield
    except AdapterFileError:
        raise
    except (ConfigError, ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise AdapterFileError(f"{folder} holds settings that cannot be used: {error}") from error
