"""The manifest of a checkpoint: a small file beside it, ``last.ckpt.manifest.json``, with size and SHA-256.

The manifest names every version that the checkpoint file may be: one, or two while the second is about to replace the
first. It is written with both versions before the file is renamed into place, and with the new one only after that. So
the file agrees with its manifest at every moment, even if the process is killed between the two renames.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from packaging.version import InvalidVersion, Version

from lightning_lora.errors import AdapterFileError, CheckpointFileError
from lightning_lora.files.atomic import sha256, write_text
from lightning_lora.versions import installed_version

SUFFIX = ".manifest.json"
LIBRARIES = ("lightning-lora", "lightning", "torch")
FORMAT = 1
_ZIP, _OLD_PICKLE = b"PK\x03\x04", b"\x80\x02"


class DamagedManifestError(AdapterFileError):
    """A manifest cannot be read; the message is the end of a sentence about the checkpoint."""


@dataclass(frozen=True)
class CheckpointVersion:
    """One content of a checkpoint file.

    Args:
        sha256: SHA-256 of the whole file, 64 hexadecimal digits.
        step: Optimizer steps taken when it was written. Checkpoints are ordered by it, as clocks may jump.
        run: Name of the run that wrote it; runs resumed from it have the same name.
        is_resumable: Whether it holds optimizer states, not only weights.
    """

    sha256: str
    size: int
    step: int = 0
    epoch: int = 0
    run: str = ""
    is_resumable: bool = True


@dataclass(frozen=True)
class Finding:
    """The result of `examine`.

    Args:
        damage: What is wrong with the file, the end of a sentence; None if the file is whole.
        version: The version that a whole file is, or that a damaged file should be; None without a readable manifest.
    """

    damage: str | None
    version: CheckpointVersion | None


def manifest_of(path: Path) -> Path:
    """The path of the manifest of a checkpoint."""
    return path.with_name(path.name + SUFFIX)


def write_manifest(path: Path, versions: Sequence[CheckpointVersion]) -> None:
    """Write the manifest of the checkpoint at ``path``: the versions that the file may be, the newest last."""
    libraries = {name: installed_version(name) for name in LIBRARIES}
    content = {"format": FORMAT, "versions": [asdict(one) for one in versions], "libraries": libraries}
    write_text(manifest_of(path), json.dumps(content, indent=1))


def read_manifest(path: Path) -> list[CheckpointVersion]:
    """The versions that the checkpoint at ``path`` may be, the newest last; empty if it has no manifest.

    Raises:
        DamagedManifestError: If the manifest cannot be read.
        AdapterFileError: If the manifest has a newer format.
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
    raise CheckpointFileError(f"{manifest} has format {content['format']}, newer than {FORMAT}: update lightning-lora.")


def other_libraries(path: Path) -> list[str]:
    """Libraries that are now at another minor release than when ``path`` was written: ``torch 2.12.1 (now 2.13.0)``."""
    try:
        written = json.loads(manifest_of(path).read_bytes())["libraries"]
        present = {name: installed_version(name) for name in LIBRARIES if name in written}
        return [f"{name} {written[name]} (now {now})" for name, now in present.items() if _differ(written[name], now)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []  # there is no manifest, or it does not name them


def _differ(written: str, now: str) -> bool:
    """Whether two versions are of different minor releases; nothing is known of a package that runs from a checkout."""
    try:
        return Version(written).release[:2] != Version(now).release[:2]
    except InvalidVersion:
        return False


def examine(path: Path) -> Finding:
    """Compare a checkpoint with its manifest, or without one with the checksums inside every file of ``torch.save``.

    Raises:
        AdapterFileError: If the manifest has a newer format, so that nothing is known of the file.
    """
    try:
        versions = read_manifest(path)
    except DamagedManifestError as error:
        return Finding(str(error), None)
    newest = versions[-1] if versions else None
    if not path.is_file():
        return Finding("it is gone", newest)
    if packed := packed_parts(path):
        return Finding(packed, newest)
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


def packed_parts(file: Path | IO[bytes]) -> str | None:
    """What is wrong with an archive that unpacks to more than it is, which ``torch.save`` never writes; else None.

    Ten gigabytes of zeros fit into a file of ten megabytes, and torch would unpack them into memory.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError):
        return None  # not an archive, or a damaged one: others say so
    packed = next((part for part in parts if part.compress_type != zipfile.ZIP_STORED), None)
    if packed:
        return f"its part {packed.filename!r} is compressed, {packed.file_size:,} bytes in {packed.compress_size:,}"
    places = [part.header_offset for part in parts]
    return None if len(set(places)) == len(places) else "several of its parts are one and the same piece of it"


def present_versions(path: Path) -> list[CheckpointVersion]:
    """The versions that a checkpoint may be which is about to be replaced; empty if it does not exist or is damaged."""
    if not path.is_file():
        return []  # a killed writer left a manifest without a checkpoint
    try:
        versions = read_manifest(path)
    except AdapterFileError:
        return []  # the old manifest is damaged; it will be overwritten
    if versions or _damage_by_itself(path):
        return versions
    return [CheckpointVersion(sha256(path), path.stat().st_size)]


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder that have a readable manifest, ordered by step, the latest first."""
    found = []
    for manifest in folder.glob(f"*{SUFFIX}"):
        path = manifest.with_name(manifest.name.removesuffix(SUFFIX))
        try:
            versions = read_manifest(path)
        except AdapterFileError:
            continue  # its name asked for directly gives the error
        if versions and path.is_file():
            found.append(((versions[-1].step, path.name), path))
    return [path for _, path in sorted(found, reverse=True)]


def remove_orphans(folder: Path) -> None:
    """Remove the manifests in ``folder`` whose checkpoint does not exist."""
    for manifest in folder.glob(f"*{SUFFIX}"):
        if not os.path.lexists(manifest.with_name(manifest.name.removesuffix(SUFFIX))):
            manifest.unlink(missing_ok=True)


def _versions(entries: list[dict[str, Any]]) -> list[CheckpointVersion]:
    versions = [CheckpointVersion(**entry) for entry in entries]
    if not versions or any(type(number) is not int for one in versions for number in (one.size, one.step)):
        raise ValueError(entries)
    return versions


def _damage_by_itself(path: Path) -> str | None:
    """What is wrong with a checkpoint by its own checksums; None if nothing is found."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start != _ZIP:
        # The format of torch before 1.6 holds no checksums; only loading would test it.
        return None if start.startswith(_OLD_PICKLE) else "it does not begin like a checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        return f"it is incomplete ({error})"
    return None if member is None else f"the checksum of its part {member!r} is wrong"
