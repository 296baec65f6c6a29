"""The checkpoint to load: the one that was named, or if it is damaged the last whole one beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lightning_lora.errors import CheckpointFileError
from lightning_lora.files.checkpoint_manifest import CheckpointVersion, checkpoints_in, examine


@dataclass(frozen=True)
class WholeCheckpoint:
    """A checkpoint file that is whole.

    Args:
        path: The file, with links resolved.
        version: The version in its manifest; None if it has no manifest.
        stands_for: A sentence about the damaged file that was asked for; None if this is the file asked for.
    """

    path: Path
    version: CheckpointVersion | None
    stands_for: str | None = None

    @property
    def remark(self) -> str | None:
        """What a user should know about the choice; None if the file is the one named, verified by its manifest."""
        if self.stands_for is not None:
            step = self.version.step if self.version else 0
            return f"{self.stands_for} Loading {self.path} (step {step}) instead, the last whole checkpoint beside it."
        if self.version is None:
            return f"{self.path} has no manifest; its own checksums agree, which is all that can be verified of it."
        return None


def whole_checkpoint(path: Path, fall_back: bool = True) -> WholeCheckpoint:
    """The file at ``path`` if it is whole, else the last whole checkpoint beside it.

    Raises:
        FileNotFoundError: If there is no file at ``path``.
        AdapterFileError: If it is damaged, and there is no whole checkpoint beside it or ``fall_back`` is False.
    """
    if not os.path.lexists(path):
        raise FileNotFoundError(f"Checkpoint file not found: {path}")
    real = Path(os.path.realpath(path))
    finding = examine(real)
    if finding.damage is None:
        return WholeCheckpoint(real, finding.version)
    damage = f"{path} is damaged: {finding.damage}."
    other = _last_whole(real, finding.version)
    if other is None:
        raise CheckpointFileError(
            f"{damage} {real.parent} holds no whole checkpoint that could stand for it: restore the file from a copy, "
            "or start anew."
        )
    if not fall_back:
        raise CheckpointFileError(
            f"{damage} The last whole checkpoint beside it is {other[0]} (step {other[1].step}): name that one, if "
            "you mean it."
        )
    return WholeCheckpoint(*other, stands_for=damage)


def _last_whole(damaged: Path, expected: CheckpointVersion | None) -> tuple[Path, CheckpointVersion] | None:
    """The latest whole checkpoint of the folder that is of the same run as ``damaged``, and not ahead of it."""
    for path in checkpoints_in(damaged.parent):
        if path == damaged:
            continue
        finding = examine(path)
        if finding.damage is not None or finding.version is None:
            continue
        version = finding.version
        is_fit = version.is_resumable if expected is None else _stands_for(version, expected)
        if is_fit:
            return path, version
    return None


def _stands_for(version: CheckpointVersion, expected: CheckpointVersion) -> bool:
    return (
        version.run == expected.run and version.step <= expected.step and version.is_resumable >= expected.is_resumable
    )
