"""Reading a Lightning checkpoint without Lightning, and without unpickling."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from lightning_lora.errors import AdapterFileError, CheckpointFileError, first_line
from lightning_lora.files.checkpoint_manifest import examine, manifest_of, packed_parts

CHECKPOINT_KEY = "lightning_lora"
"""The key of an adapter-only checkpoint under which its adapters are described."""


def refuse_packed(file: Path | IO[bytes]) -> None:
    """Raise `AdapterFileError` if a checkpoint unpacks to more than it is: a small one could fill the memory."""
    if packed := packed_parts(file):
        raise CheckpointFileError(f"{file} is damaged: {packed}.")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a Lightning checkpoint with ``weights_only=True``, so that no code in it runs.

    Raises:
        AdapterFileError: If it cannot be loaded this way, or is not what its manifest says.
    """
    damage = examine(path).damage if manifest_of(path).is_file() else packed_parts(path)
    if damage:
        raise CheckpointFileError(f"{path} is damaged: {damage}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged or unsafe files
        if damage := examine(path).damage:
            raise CheckpointFileError(f"{path} is not a checkpoint, or a damaged one: {damage}.") from error
        raise unsafe_checkpoint(path, error) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointFileError(f"{path} is not a Lightning checkpoint: it has no state_dict.")
    return checkpoint


def unsafe_checkpoint(path: Path | str, error: Exception) -> AdapterFileError:
    """The error to raise for a checkpoint that torch does not load as plain values; torch's own offers to run it."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    what = f"it names {named[1]}, which is no plain type." if named else first_line(error)
    return CheckpointFileError(
        f"{path} is not a checkpoint that can be loaded safely: {what} It is never unpickled, as that could run code: "
        "save what you need of it as tensors, numbers and texts."
    )


def written_by(checkpoint: Mapping[str, Any]) -> str | None:
    """The dotted name of the module that a checkpoint is of; None if it does not tell.

    One with adapters tells in its manifest, another one in the hyperparameters of a run of the command line.
    """
    manifest = checkpoint.get(CHECKPOINT_KEY) or {}
    return manifest.get("module") or checkpoint.get("hyper_parameters", {}).get("_class_path")
