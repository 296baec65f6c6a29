"""Reads an adapter on disk without its base: ranks, roles, norms, spectra, health."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.errors import RunSourceError
from lightning_lora.files.adapter.folder import check_finite, read_adapter_folder
from lightning_lora.files.adapter.manifest import MANIFEST_FILE
from lightning_lora.files.checkpoint_manifest import manifest_of
from lightning_lora.files.lightning_checkpoint import CHECKPOINT_KEY, read_checkpoint
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.functional import effective_rank, singular_values
from lightning_lora.lora.layers.adapted import factor_owner
from lightning_lora.lora.layers.base import is_factor


@dataclass(frozen=True)
class LayerInspection:
    """Numbers of one adapted layer.

    Args:
        name: Dotted name of the layer.
        role: Role of the layer in its model, such as ``"attention"``; ``"?"`` if the file does not say.
        rank: Inner dimension of the update.
        norm: Frobenius norm of the update, in weight units.
        largest: Largest singular value of the update.
        effective_rank: Number of directions that the update uses; see `lightning_lora.lora.functional.effective_rank`.
        magnitude_change: How far training has moved the magnitudes (DoRA) from the norms of the base, relatively; None
            without magnitudes, and where the file does not say.
    """

    name: str
    role: str
    rank: int
    norm: float
    largest: float
    effective_rank: float
    magnitude_change: float | None = None


@dataclass(frozen=True)
class Inspection:
    """Contents of an adapter folder or an adapter-only checkpoint."""

    path: Path
    kind: str
    base: str | None
    fingerprint: str | None
    config: LoRAConfig
    layers: tuple[LayerInspection, ...]
    trained: tuple[str, ...]
    summary: Mapping[str, Any]

    @property
    def idle(self) -> tuple[str, ...]:
        """Names of the layers whose update is zero."""
        return tuple(layer.name for layer in self.layers if layer.norm == 0)


def inspect_path(path: str | Path) -> Inspection:
    """Read an adapter folder or an adapter-only Lightning checkpoint; hashes are verified if it has any.

    Raises:
        AdapterFileError: If ``path`` is neither, or damaged.
    """
    path = Path(path)
    return _inspect_folder(path) if path.is_dir() or not path.exists() else _inspect_checkpoint(path)


def verify_hashes(inspection: Inspection) -> str:
    """A sentence for the user that all files agree with their hashes, which `inspect_path` has compared.

    Raises:
        AdapterFileError: If the adapter has no hashes.
    """
    path = inspection.path
    manifest = path / MANIFEST_FILE if path.is_dir() else manifest_of(path)
    if not manifest.is_file():
        raise RunSourceError(f"{path} has no {manifest.name}: there are no hashes to verify.")
    return f"verified: every file has the size and SHA-256 of {manifest.name}"


def _inspect_folder(path: Path) -> Inspection:
    folder = read_adapter_folder(path)
    manifest = folder.manifest
    entries = manifest.layers
    roles = {name: entry.role for name, entry in entries.items()}
    layers = _layers(folder.factors, folder.config, roles, manifest.alphas or folder.config.alpha_pattern)
    return Inspection(
        path=path,
        kind="adapter folder" if manifest.is_present else "PEFT adapter folder",
        base=folder.peft.get("base_model_name_or_path"),
        fingerprint=manifest.base_fingerprint or None,
        config=folder.config,
        layers=tuple(
            replace(layer, magnitude_change=entry.magnitude_change if (entry := entries.get(layer.name)) else None)
            for layer in layers
        ),
        trained=tuple(folder.trained),
        summary=manifest.summary,
    )


def _inspect_checkpoint(path: Path) -> Inspection:
    checkpoint = read_checkpoint(path)
    manifest = checkpoint.get(CHECKPOINT_KEY)
    if manifest is None:
        raise RunSourceError(f"{path} is a full checkpoint: it holds no adapter.")
    state = {name: checkpoint["state_dict"][name] for name in manifest["tensors"]}
    check_finite(state, str(path))
    factors = {name: tensor for name, tensor in state.items() if is_factor(name)}
    config = LoRAConfig.from_dict(manifest["config"])
    return Inspection(
        path=path,
        kind="Lightning checkpoint",
        base=checkpoint.get("hyper_parameters", {}).get("model"),
        fingerprint=manifest["base_fingerprint"],
        config=config,
        layers=_layers(factors, config, manifest["roles"], manifest["alphas"]),
        trained=tuple(name for name in state if name not in factors),
        summary={"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]},
    )


def _layers(
    factors: Mapping[str, Tensor], config: LoRAConfig, roles: Mapping[str, str], alphas: Mapping[str, float]
) -> tuple[LayerInspection, ...]:
    layers = []
    for key, A in factors.items():
        name, factor = factor_owner(key)
        if factor == "lora_A":
            B = factors[f"{key.removesuffix('lora_A')}lora_B"]
            values = singular_values(A, B, config.scale(A.shape[-2], alphas.get(name, config.alpha)))
            layers.append(
                LayerInspection(
                    name,
                    roles.get(name, "?"),
                    A.shape[-2],
                    float(values.norm()),
                    float(values.max()),
                    # Experts are many matrices: the mean over them.
                    sum(map(effective_rank, values.reshape(-1, values.shape[-1]))) / values[..., 0].numel(),
                )
            )
    return tuple(layers)
