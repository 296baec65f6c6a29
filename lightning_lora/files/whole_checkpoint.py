"""Which checkpoint to load: the one that was named, or where it is damaged the last whole one beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lightning_lora.errors import AdapterFileError
from lightning_lora.files.checkpoint_manifest import Version, checkpoints_in, examine


@dataclass(frozen=True)
class WholeCheckpoint:
    """A checkpoint file that is whole.

    Args:
        path: The file, links resolved.
        version: The version that its manifest says it is; None if it has no manifest.
        stands_for: The damaged file that was asked for, and what is wrong with it; None if this is that file.
    """

    path: Path
    version: Version | None
    stands_for: str | None = None

    @property
    def remark(self) -> str | None:
        """What a user should know of the choice; None if the file is the one named, verified by its manifest."""
        if self.stands_for is not None:
            step = self.version.step if self.version else 0
            return f"{self.stands_for} Loading {self.path} (step {step}) instead, the last whole checkpoint beside it."
        if self.version is None:
            return f"{self.path} has no manifest; its own checksums agree, which is all that can be verified of it."
        return None


def whole_checkpoint(path: Path, fall_back: bool = True) -> WholeCheckpoint:
    """The file at ``path`` if it is whole, else the last whole checkpoint beside it.

    Raises:
        FileNotFoundError: If there is no such file.
        AdapterFileError: If it is damaged, and nothing whole is beside it or ``fall_back`` is false.
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
        raise AdapterFileError(
            f"{damage} {real.parent} holds no whole checkpoint that could stand for it: restore the file from a copy, "
            "or start anew."
        )
    if not fall_back:
        raise AdapterFileError(
            f"{damage} The last whole checkpoint beside it is {other[0]} (step {other[1].step}): name that one, if "
            "you mean it."
        )
    return WholeCheckpoint(*other, stands_for=damage)


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
