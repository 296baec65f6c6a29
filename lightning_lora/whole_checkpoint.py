"""Which checkpoint to load: the one that was named, or where it is damaged the last whole one beside it."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_lora.checkpoint_manifest import Version, checkpoints_in, examine
from lightning_lora.errors import AdapterFileError


def whole_checkpoint(path: Path, fall_back: bool = True) -> tuple[Path, Version | None]:
    """``path`` where it is whole, else the last whole checkpoint beside it, with a warning; and the version it is.

    Raises:
        FileNotFoundError: If there is no such file.
        AdapterFileError: If it is damaged, and nothing whole is beside it or ``fall_back`` is false.
    """
    if not os.path.lexists(path):
        raise FileNotFoundError(f"Checkpoint file not found: {path}")
    real = Path(os.path.realpath(path))
    finding = examine(real)
    if finding.damage is None:
        if finding.version is None:
            rank_zero_info(f"{path} has no manifest; its own checksums agree, which is all that can be verified of it.")
        return real, finding.version
    damage = f"{path} is damaged: {finding.damage}."
    other = _last_whole(real, finding.version)
    if other is None:
        raise AdapterFileError(
            f"{damage} {real.parent} holds no whole checkpoint that could stand for it: restore the file from a copy, "
            "or start anew."
        )
    instead = f"{other[0]} (step {other[1].step})"
    if not fall_back:
        raise AdapterFileError(
            f"{damage} The last whole checkpoint beside it is {instead}: name that one, if you mean it."
        )
    rank_zero_warn(f"{damage} Loading {instead} instead, the last whole checkpoint beside it.")
    return other


def _last_whole(damaged: Path, expected: Version | None) -> tuple[Path, Version] | None:
    """The latest whole checkpoint of the folder that may stand for ``damaged``: of its run, and not ahead of it."""
    for path in checkpoints_in(damaged.parent):
        if path == damaged:
            continue
        finding = examine(path)
        if finding.damage is not None or finding.version is None:
            continue
        version = finding.version
        if expected is None and version.is_resumable:
            return path, version
        if expected is not None and _stands_for(version, expected):
            return path, version
    return None


def _stands_for(version: Version, expected: Version) -> bool:
    return (
        version.run == expected.run and version.step <= expected.step and version.is_resumable >= expected.is_resumable
    )
