"""An adapter folder as read from disk, verified before anything else uses it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFileError, AdapterFolderError, ConfigError, first_five
from lightning_lora.files.adapter import peft_config, peft_experts, peft_layers, peft_patterns
from lightning_lora.files.adapter.manifest import Manifest, read_manifest, undescribed
from lightning_lora.files.adapter.peft_format import (
    CONFIG_FILE,
    TENSOR_FILE,
    FactorPair,
    embedding_of,
    split_tensor_name,
    stored_weight,
    without_adapter_name,
)
from lightning_lora.files.adapter.peft_magnitudes import check_pair, magnitudes_of, read_magnitudes
from lightning_lora.files.adapter.peft_patterns import is_base_copy
from lightning_lora.files.json_object import read_json
from lightning_lora.files.safetensors_file import read_tensors
from lightning_lora.lora.adapter import check_finite
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import factor_owner
from lightning_lora.lora.layers.base import FACTORS, MAGNITUDE, AdapterSpec, WeightShape


@dataclass(frozen=True)
class AdapterFolder:
    """The contents of an adapter folder.

    Args:
        peft: Contents of ``adapter_config.json``.
        manifest: Contents of ``lightning_lora.json``; empty for a folder written by PEFT.
        ranks: Adapted weight to rank.
        factors: Adapter tensors by the names this package uses, ``<module>.lora_A``; with DoRA magnitudes too.
        stacked: Factors of targeted parameters in PEFT's layout, by its module names. Only the model tells what they
            are: fused experts, or a single matrix.
        trained: Tensors of modules trained in full, by parameter name, and others that training changed.
        base_copies: Base weights that are stored too, as PEFT stores embeddings that were resized, by parameter name.
        embeddings: Names of the adapted weights that are stored transposed, as those of embeddings are.
        parameters: Adapted weight to its parameter, for those that the config targets as parameters.
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
    parameters: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def pairs(self) -> dict[str, FactorPair]:
        """Adapted weight to its ``A`` and ``B``."""
        return _pairs(self.factors, self.path)

    @cached_property
    def magnitudes(self) -> dict[str, Tensor]:
        """Adapted weight to its magnitude; empty without DoRA."""
        return magnitudes_of(self.factors)

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

    def with_factors(self, unstacked: peft_experts.Unstacked) -> AdapterFolder:
        """The same folder with the unstacked factors in place of the stacked ones.

        Raises:
            AdapterFileError: If their ranks are not those of the config.
        """
        # PEFT matches the names of parameters with the patterns for rank and alpha.
        peft = peft_config.with_values_of(self.peft, unstacked.keys)
        embeddings = self.embeddings | unstacked.transposed
        known = replace(self, stacked={}, embeddings=embeddings, parameters=unstacked.keys)
        return known._with(self.factors | unstacked.factors, peft)

    def replaced(
        self, gone: Collection[str], factors: Mapping[str, Tensor], alphas: Mapping[str, float]
    ) -> AdapterFolder:
        """The same folder with other adapted weights in place of some.

        Args:
            gone: Adapted weights to take out.
            factors: Factors of the others, by name.
            alphas: The others and their alphas.
        """
        peft = peft_config.with_own_values(self.peft, _ranks(factors, self.path), alphas)
        kept = {name: tensor for name, tensor in self.factors.items() if factor_owner(name)[0] not in gone}
        return self._with({**kept, **factors}, peft)

    def renamed(self, names: Mapping[str, str]) -> AdapterFolder:
        """The same folder with other names for some adapted layers: old name to new name."""
        peft = peft_config.with_values_of(self.peft, {new: old for old, new in names.items()})
        factors = {}
        for key, tensor in self.factors.items():
            layer, _, factor = key.rpartition(".")
            factors[f"{names.get(layer, layer)}.{factor}"] = tensor
        return self._with(factors, peft)

    def _with(self, factors: dict[str, Tensor], peft: dict[str, Any]) -> AdapterFolder:
        ranks = _ranks(factors, self.path)
        peft_config.check_ranks(peft, ranks, str(self.path))
        config = peft_config.to_lora_config(peft, ranks, self.config.trainable)
        return replace(self, peft=peft, factors=factors, ranks=ranks, config=config)


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
    tensors = without_adapter_name(read_tensors(tensor_file), tensor_file)
    stored, trained, base_copies = _split(tensors, peft, manifest, tensor_file)
    trained = {name: tensor for name, tensor in trained.items() if name not in manifest.beside}
    factors, projections = peft_layers.from_peft(stored, manifest, str(peft.get("peft_version", "")))
    factors = {name: tensor for name, tensor in factors.items() if factor_owner(name)[0] not in manifest.following}
    factors = read_magnitudes(factors, peft, manifest, tensor_file)
    with _usable_settings(folder):
        factors, stacked = peft_experts.split_stacked(factors, projections, manifest, peft)
    if manifest.is_present:
        factors, stacked = factors | peft_experts.unstack_by_manifest(stacked, manifest, str(tensor_file)), {}
    ranks = _ranks(factors, tensor_file)
    if manifest.is_present and manifest.ranks != ranks:
        raise undescribed(folder)
    with _usable_settings(folder):
        if not manifest.is_present:
            _check_targeted(folder, peft, ranks, projections)
        peft = peft_layers.with_projections(peft, projections, manifest)
        config = _config(folder, manifest, peft, ranks, trained, stacked)
    embeddings = frozenset(module for name in tensors if (module := embedding_of(name)) is not None)
    return AdapterFolder(folder, peft, manifest, config, ranks, factors, stacked, trained, base_copies, embeddings)


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "absent"
        raise AdapterFolderError(f"{folder} is {kind}; an adapter is a folder with {CONFIG_FILE}.")
    if not (folder / CONFIG_FILE).is_file():
        held = first_five(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
        if inner:
            raise AdapterFolderError(
                f"{folder} is not an adapter, but holds some: give one of {first_five(inner)} in it."
            )
        raise AdapterFolderError(f"{folder} is not an adapter: it has no {CONFIG_FILE}, only {held}.")
    if not (folder / TENSOR_FILE).is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise AdapterFolderError(
                f"{folder} holds only {pickled[0]}, a pickle, which can run code and is never opened. Load it in PEFT "
                f"where you trust it and save it again as safetensors."
            )
        raise AdapterFolderError(f"{folder} has no {TENSOR_FILE}.")


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
        elif parameter in manifest.base_copies or (not manifest.is_present and is_base_copy(parameter, kind, peft)):
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
        names = [*trained, *base_copies]
        raise AdapterFolderError(
            f"{where} holds no adapter tensors, such as ....lora_A.weight; only {first_five(names)}."
        )
    # A buffer may hold infinities, such as a mask or a range that was never observed.
    finite = {name: tensor for name, tensor in trained.items() if name not in manifest.moved}
    check_finite(factors | base_copies | finite, str(where))
    return factors, trained, base_copies


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
            raise AdapterFolderError(f"{where}: the factors of {name!r} do not fit: {shapes}.")
        check_pair(name, pair.get(MAGNITUDE), B, where)
        pairs[name] = (A, B)
    return pairs


def _ranks(factors: Mapping[str, Tensor], where: Path) -> dict[str, int]:
    return {name: A.shape[-2] for name, (A, _) in _pairs(factors, where).items()}


def _config(
    folder: Path,
    manifest: Manifest,
    peft: Mapping[str, Any],
    ranks: Mapping[str, int],
    trained: Mapping[str, Tensor],
    stacked: Collection[str],
) -> LoRAConfig:
    """The settings of the adapter, after checking that all files agree about them."""
    peft_config.check_ranks(peft, ranks, str(folder))
    if not manifest.is_present:
        # Until the model tells what the stacked factors are, their names stand for them.
        known = ranks or {name: peft.get("r", 8) for name in stacked}
        return peft_config.to_lora_config(peft, known, dict.fromkeys(name.rpartition(".")[0] for name in trained))
    config = LoRAConfig.from_dict(manifest.config)
    peft_config.check_scales(peft, manifest.alphas, config, str(folder))
    return config


def _check_targeted(
    folder: Path, peft: Mapping[str, Any], ranks: Mapping[str, int], projections: Collection[str]
) -> None:
    """Refuse tensors of layers that the config does not adapt; PEFT would leave them out without a word."""
    targeted = peft_patterns.TargetedNames(peft)
    if not targeted.are_told or peft.get("ensure_weight_tying"):
        return
    # PEFT adapts an output projection with its attention.
    surplus = [name for name in ranks if (name.rpartition(".")[0] if name in projections else name) not in targeted]
    if surplus:
        raise AdapterFolderError(
            f"{folder} holds tensors of {len(surplus)} layers that its config does not adapt: {first_five(surplus)}. "
            f"PEFT would leave them out. Correct target_modules, exclude_modules or layers_to_transform in "
            f"{CONFIG_FILE}, or take the tensors out."
        )


@contextmanager
def _usable_settings(folder: Path) -> Iterator[None]:
    """Raise `AdapterFileError` for any error about values in the settings, within the context."""
    try:
        yield
    except AdapterFileError:
        raise
    except (ConfigError, ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise AdapterFolderError(f"{folder} holds settings that cannot be used: {error}") from error
