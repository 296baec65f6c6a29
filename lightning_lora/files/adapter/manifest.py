"""``lightning_lora.json``, the manifest beside PEFT's two files: what they must be, and what PEFT has no place for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_lora.errors import AdapterFileError, AdapterFolderError
from lightning_lora.files.adapter.peft_format import CONFIG_FILE, TENSOR_FILE
from lightning_lora.files.atomic import sha256
from lightning_lora.files.json_object import read_json
from lightning_lora.lora.fingerprint import WeightPrint

MANIFEST_FILE = "lightning_lora.json"
_LISTS = ("following", "beside", "base_copies", "moved")
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class WeightEntry:
    """The manifest's entry of one adapted weight.

    Args:
        role: What the layer is in its model: ``attention``, ``mlp``, ``head``, ...
        parameter: Dotted name of the base parameter.
        base: Digest of the base parameter.
        experts: Number of fused experts; 0 for a single matrix.
        swapped: Whether the stored factors of the experts take inputs for outputs.
        shared: ``lora_A`` or ``lora_B`` if all experts share this factor, else None.
        stored: How factors that are not stored as plain matrices are stored, else None.
        magnitude_change: How far training has moved the magnitudes (DoRA) from the norms of the base, relatively; None
            without magnitudes, and where the base was sharded.
    """

    rank: int
    alpha: float
    role: str = "?"
    parameter: str
    base: str | None
    experts: int = 0
    swapped: bool = False
    shared: str | None = None
    stored: str | None = None
    magnitude_change: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entry as it is written; what does not concern the weight is left out."""
        unused = {name for name in ("stored", "magnitude_change") if getattr(self, name) is None}
        unused |= set() if self.experts else {"experts", "swapped", "shared"}
        return {name: value for name, value in vars(self).items() if name not in unused}


@dataclass(frozen=True)
class Manifest:
    """The contents of the manifest. A folder written by PEFT has none; it is read as the empty ``Manifest()``.

    Args:
        versions: Library to its version when the folder was written.
        config: Settings of the adapter, as `LoRAConfig.to_dict` gives them.
        layers: Adapted weight to its entry.
        following: Layers that use the update of the layer they share their weight with.
        beside: Stored tensors that were not trained, and are there because PEFT asks for whole modules.
        base_copies: Parameters of the base that are stored too, as a resized vocabulary is in no other file.
        base_fingerprint: Digest of the whole base.
        base: Parameter of the base to its print, for parameters that the folder does not hold. Versions up to 0.1 wrote
            none.
        summary: Facts of the training run, name to number or text.
        moved: Names of the stored tensors that training changed without an optimizer: buffers, and weights of a frozen
            copy of the network.
        tensors: Stored tensor to its shape.
        files: File name to its size in bytes and its SHA-256.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, WeightEntry] = field(default_factory=dict)
    following: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    base_copies: tuple[str, ...] = ()
    base_fingerprint: str = ""
    base: Mapping[str, WeightPrint] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    moved: tuple[str, ...] = ()
    tensors: Mapping[str, list[int]] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_present(self) -> bool:
        """Whether the folder has a manifest."""
        return bool(self.layers)

    @property
    def ranks(self) -> dict[str, int]:
        """Adapted weight to its rank."""
        return {name: entry.rank for name, entry in self.layers.items()}

    @property
    def alphas(self) -> dict[str, float]:
        """Adapted weight to its alpha."""
        return {name: entry.alpha for name, entry in self.layers.items()}

    def to_dict(self) -> dict[str, Any]:
        """The manifest as it is written."""
        entries = {"layers": self.layers, "base": self.base}
        plain = {key: {name: entry.to_dict() for name, entry in table.items()} for key, table in entries.items()}
        return {"format": FORMAT} | vars(self) | plain


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an adapter folder, and compare every file with the size and SHA-256 it gives.

    Raises:
        AdapterFileError: If the manifest is damaged or of a newer format, or a file is not what it says.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return Manifest()
    content = read_json(folder / MANIFEST_FILE)
    _check_files(folder, content)
    if not _describes_layers(content):
        raise undescribed(folder)
    layers = {name: WeightEntry(**_fields(WeightEntry, entry)) for name, entry in content["layers"].items()}
    base = {name: WeightPrint.from_dict(entry) for name, entry in content.get("base", {}).items()}
    lists = {name: tuple(content.get(name, ())) for name in _LISTS}
    parsed: dict[str, Any] = {"layers": layers, "base": base, **lists}
    return Manifest(**_fields(Manifest, content) | parsed)


def undescribed(folder: Path) -> AdapterFileError:
    """The error for a manifest that does not belong to the tensors of ``folder``."""
    return AdapterFolderError(
        f"{folder / MANIFEST_FILE} does not describe the tensors beside it; delete it to load the rest."
    )


def _check_files(folder: Path, content: Mapping[str, Any]) -> None:
    """Every file must be what the manifest says."""
    if not _describes_files(content):
        raise AdapterFolderError(
            f"{folder / MANIFEST_FILE} is not a lightning-lora manifest; delete it to load the rest."
        )
    if content["format"] > FORMAT:
        raise AdapterFolderError(
            f"{folder} has manifest format {content['format']}, newer than {FORMAT}: update lightning-lora."
        )
    for name, expected in content["files"].items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise AdapterFolderError(f"{folder} lacks {name!r}, which its manifest lists.")
        if file.stat().st_size != expected["bytes"]:
            raise AdapterFolderError(
                f"{file} is incomplete or changed: expected {expected['bytes']} bytes, found {file.stat().st_size}."
            )
        if sha256(file) != expected["sha256"]:
            raise AdapterFolderError(f"{file} was changed after it was saved: its SHA-256 is not the manifest's.")


def _describes_files(content: Mapping[str, Any]) -> bool:
    files = content.get("files")
    return (
        isinstance(content.get("format"), int)
        and isinstance(files, dict)
        and {CONFIG_FILE, TENSOR_FILE} <= files.keys()
        and all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values())
    )


def _describes_layers(content: Mapping[str, Any]) -> bool:
    layers = content.get("layers")
    return (
        isinstance(content.get("config"), dict)
        and isinstance(content.get("base_fingerprint"), str)
        and all(isinstance(content.get(name, []), list) for name in _LISTS)
        and isinstance(layers, dict)
        and bool(layers)
        and all(map(_is_entry, layers.values()))
        and isinstance(content.get("base", {}), dict)
        and all(map(_is_print, content.get("base", {}).values()))
    )


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and {"rank", "alpha", "parameter", "base"} <= entry.keys()
        and isinstance(entry["alpha"], (int, float))
        and entry["alpha"] > 0
    )


def _is_print(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and {"digest", "shape", "dtype", "values"} <= entry.keys()
        and isinstance(entry["shape"], list)
        and isinstance(entry["values"], list)
        and all(isinstance(value, (int, float)) for value in entry["values"])
    )


def _fields(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``content`` that a dataclass has fields for; a later version may write more."""
    known = {item.name for item in fields(kind)}
    return {name: value for name, value in content.items() if name in known}
