"""Reading a Lightning checkpoint without Lightning, and never by unpickling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_lora.errors import AdapterFileError
from lightning_lora.files.checkpoint_manifest import examine, manifest_of

CHECKPOINT_KEY = "lightning_lora"
"""The entry of an adapter-only checkpoint that describes its adapters."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint, loaded under ``weights_only=True`` and never otherwise.

    Raises:
        AdapterFileError: If it cannot be loaded that way, or is not what its manifest says.
    """
    if manifest_of(path).is_file() and (damage := examine(path).damage):
        raise AdapterFileError(f"{path} is damaged: {damage}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged or unsafe files, and all mean the same here
        raise AdapterFileError(
            f"{path} is not a checkpoint that can be loaded safely: {str(error).splitlines()[0]} It is never unpickled."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise AdapterFileError(f"{path} is not a Lightning checkpoint: it has no state_dict.")
    return checkpoint
