"""Reading a Lightning checkpoint without Lightning, and without unpickling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_lora.errors import AdapterFileError
from lightning_lora.files.checkpoint_manifest import examine, manifest_of

CHECKPOINT_KEY = "lightning_lora"
"""The key of an adapter-only checkpoint under which its adapters are described."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a Lightning checkpoint with ``weights_only=True``, so that no code in it runs.

    Raises:
        AdapterFileError: If it cannot be loaded this way, or is not what its manifest says.
    """
    if manifest_of(path).is_file() and (damage := examine(path).damage):
        raise AdapterFileError(f"{path} is damaged: {damage}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged or unsafe files
        if damage := examine(path).damage:
            raise AdapterFileError(f"{path} is not a checkpoint, or a damaged one: {damage}.") from error
        raise AdapterFileError(
            f"{path} is not a checkpoint that can be loaded safely: {str(error).splitlines()[0]} It is never unpickled."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise AdapterFileError(f"{path} is not a Lightning checkpoint: it has no state_dict.")
    return checkpoint


def written_by(checkpoint: Mapping[str, Any]) -> str | None:
    """The dotted name of the module that a checkpoint is of; None if it does not tell.

    One with adapters tells in its manifest, another one in the hyperparameters of a run of the command line.
    """
    manifest = checkpoint.get(CHECKPOINT_KEY) or {}
    return manifest.get("module") or checkpoint.get("hyper_parameters", {}).get("_class_path")
