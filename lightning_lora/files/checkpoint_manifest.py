"""What a checkpoint file must be, in a small file beside it: ``last.ckpt`` and ``last.ckpt.manifest.json``.

The manifest names every version that the file may be: one, or two while the second is about to replace the first. It
is written, with both, before the file is renamed into place, and once more, with the new one only, after it. So a file
that can be seen agrees with its manifest at every moment: a kill between the two renames leaves no file in doubt.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion
from packaging.version import Version as Release

from lightning_lora.errors import AdapterFileError
from lightning_lora.files.atomic import atomic_file, sha256

SUFFIX = ".manifest.json"
LIBRARIES = ("lightning-lora", "lightning", "torch")
FORMAT = 1
_ZIP, _OLD_PICKLE = b"PK\x03\x04", b"\x80\x02"


class DamagedManifestError(AdapterFileError):
    """A manifest that is none; the text is the end of a sentence."""


@dataclass(frozen=True)
class Version:
    """One content of a checkpoint file.

    Args:
        sha256: Of the whole file, 64 hexadecimal digits.
        size: Bytes.
        step: Optimizer steps taken when it was written; orders checkpoints, whatever clocks say.
        epoch: Epochs begun.
        run: Name of the run that wrote it, the same for the runs resumed from it.
        is_resumable: Whether it holds optimizer states, not weights only.
    """

    sha256: str
    size: int
    step: int = 0
    epoch: int = 0
    run: str = ""
    is_resumable: bool = True


@dataclass(frozen=True)
class Finding:
    """What a look at a checkpoint file has shown.

    Args:
        damage: What is wrong with it, the end of a sentence; None where it is whole.
        version: The version it is, or, damaged, should be. None: it has no (readable) manifest.
    """

    damage: str | None
    version: Version | None


def manifest_of(path: Path) -> Path:
    """Where the manifest of a checkpoint is."""
    return path.with_name(path.name + SUFFIX)


def write_manifest(path: Path, versions: Sequence[Version]) -> None:
    """Say what the checkpoint at ``path`` may be."""
    libraries = {name: version(name) for name in LIBRARIES}
    content = {"format": FORMAT, "versions": [asdict(one) for one in versions], "libraries": libraries}
    with atomic_file(manifest_of(path)) as file:
        file.write(json.dumps(content, indent=1).encode())


def read_manifest(path: Path) -> list[Version]:
    """The versions that the checkpoint at ``path`` may be, the newest last; empty where it has no manifest.

    Raises:
        DamagedManifestError: If the manifest is none.
        AdapterFileError: If it is of a newer format.
    """
    manifest = manifest_of(path)
    if not manifest.is_file():
        return []
    try:
        content = json.loads(manifest.read_bytes())
        if content["format"] <= FORMAT:
            return _versions(content["versions"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedManifestError(f"its manifest {manifest.name} is damaged") from error
    raise AdapterFileError(f"{manifest} has format {content['format']}, newer than {FORMAT}: update lightning-lora.")


def other_libraries(path: Path) -> list[str]:
    """Libraries of another minor release than those that wrote ``path``, as ``torch 2.12.1 (now 2.13.0)``."""
    try:
        written = json.loads(manifest_of(path).read_bytes())["libraries"]
        present = {name: version(name) for name in LIBRARIES if name in written}
        return [
            f"{name} {written[name]} (now {now})"
            for name, now in present.items()
            if Release(written[name]).release[:2] != Release(now).release[:2]
        ]
    except (OSError, ValueError, KeyError, TypeError, InvalidVersion):
        return []  # no manifest, or one that says nothing of them


def examine(path: Path) -> Finding:
    """Compare a file with its manifest; without one, with the checksums that every file of ``torch.save`` holds.

    Raises:
        AdapterFileError: If the manifest is of a newer format: nothing is known of the file then.
    """
    try:
        versions = read_manifest(path)
    except DamagedManifestError as error:
        return Finding(str(error), None)
    newest = versions[-1] if versions else None
    if not path.is_file():
        return Finding("it is gone", newest)
    if newest is None:
        return Finding(_damage_by_itself(path), None)
    size = path.stat().st_size
    if all(one.size != size for one in versions):
        return Finding(f"it has {size:,} bytes, its manifest says {newest.size:,}", newest)
    digest = sha256(path)
    matching = [one for one in versions if one.sha256 == digest]
    if matching:
        return Finding(None, matching[-1])
    return Finding(f"its SHA-256 is {digest[:12]}..., its manifest says {newest.sha256[:12]}...", newest)


def present_versions(path: Path) -> list[Version]:
    """What a checkpoint that is about to be replaced may be until then."""
    if not path.is_file():
        return []  # a manifest alone is what a killed writer has left
    try:
        versions = read_manifest(path)
    except AdapterFileError:
        return []  # damaged it is, and damaged it stays until it is replaced
    if versions or _damage_by_itself(path):
        return versions
    return [Version(sha256(path), path.stat().st_size)]


def checkpoints_in(folder: Path) -> list[Path]:
    """The files of a folder that have a readable manifest, by the step it gives, the latest first."""
    found = []
    for manifest in folder.glob(f"*{SUFFIX}"):
        path = manifest.with_name(manifest.name.removesuffix(SUFFIX))
        try:
            versions = read_manifest(path)
        except AdapterFileError:
            continue  # no candidate; whoever names it is told what is wrong
        if versions and path.is_file():
            found.append(((versions[-1].step, path.name), path))
    return [path for _, path in sorted(found, reverse=True)]


def remove_orphans(folder: Path) -> None:
    """Remove the manifests whose checkpoint was never put in place, or was removed by something else."""
    for manifest in folder.glob(f"*{SUFFIX}"):
        if not os.path.lexists(manifest.with_name(manifest.name.removesuffix(SUFFIX))):
            manifest.unlink(missing_ok=True)


def _versions(entries: list[dict[str, Any]]) -> list[Version]:
    versions = [Version(**entry) for entry in entries]
    if not versions or any(type(number) is not int for one in versions for number in (one.size, one.step)):
        raise ValueError(entries)
    return versions


def _damage_by_itself(path: Path) -> str | None:
    with open(path, "rb") as file:
        start = file.read(4)
    if start != _ZIP:
        # The format of torch before 1.6 holds no checksums; loading it is the only test.
        return None if start.startswith(_OLD_PICKLE) else "it does not begin like a checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        return f"it is incomplete ({error})"
    return None if member is None else f"the checksum of its part {member!r} is wrong"
