"""What the folder of a run of ``fit`` holds, read back: a report needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from lightning_lora.batch.calibration import PROBE_FILE
from lightning_lora.errors import DataError, ResultFileError
from lightning_lora.files.adapter.manifest import MANIFEST_FILE
from lightning_lora.files.events import EVENTS_FILE, read_events
from lightning_lora.files.folder_lock import is_locked
from lightning_lora.files.yaml_text import read_yaml
from lightning_lora.study.batch_probe_result import BatchProbeResult
from lightning_lora.study.matched.record import CURVE
from lightning_lora.study.rank_probe_result import RANK_PROBE_FILE, RankProbeResult
from lightning_lora.study.report.runs.losses import METRICS, LossCurve, read_losses

CONFIG = "config.yaml"
_SIGNS = (METRICS, CURVE, EVENTS_FILE)
"""Files of which a run folder has at least one."""
Probe = TypeVar("Probe", BatchProbeResult, RankProbeResult)
Ending = Literal["done", "stopped", "failed", "running", "killed", "unknown"]


@dataclass(frozen=True)
class SavedFile:
    """A file that the run has left.

    Args:
        name: Its place in the run folder.
        sha256: Its hash as the run has recorded it; "" if it has not.
    """

    name: str
    size: int
    sha256: str = ""


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read.

    Args:
        config: All options of ``fit``; empty for a run of a script.
        config_text: The file with them.
        losses: Losses by optimizer step.
        events: What monitors and the run itself have written, in order.
        manifest: What the adapter folder says of itself; empty without adapters.
        batch_probe: What a probe of batches has found; None without one.
        rank_probe: What a probe of ranks has found; None without one.
        remarks: Why files of the folder are left out.
        files: Adapters and checkpoints.
        is_running: Whether a live process holds the folder.
    """

    folder: Path
    config: Mapping[str, Any]
    config_text: str
    losses: LossCurve
    events: tuple[Mapping[str, Any], ...]
    manifest: Mapping[str, Any]
    batch_probe: BatchProbeResult | None
    rank_probe: RankProbeResult | None
    remarks: tuple[str, ...]
    files: tuple[SavedFile, ...]
    is_running: bool

    def all_of(self, event: str) -> list[Mapping[str, Any]]:
        """The events of one kind."""
        return [each for each in self.events if each.get("event") == event]

    def last_of(self, event: str) -> Mapping[str, Any] | None:
        """The last event of one kind; None without any."""
        return next(reversed(self.all_of(event)), None)

    @property
    def ending(self) -> Ending:
        """How the run has ended, by what it has written itself; by its lock, whether it goes on."""
        told = [each for each in self.events if each.get("event") in ("started", "ended")]
        if told and told[-1]["event"] == "ended":
            return told[-1]["how"]
        return "running" if self.is_running else "killed" if told else "unknown"

    def option(self, *names: str) -> Any:
        """An option of the config; None where there is none."""
        found: Any = self.config
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return any((folder / name).is_file() for name in _SIGNS)


def is_running(folder: Path) -> bool:
    """Whether a process that may be alive holds the folder."""
    # Beside the folder or in it: see RunLock.
    return any(map(is_locked, (folder.absolute().parent / f".{folder.name}.lock", folder / ".run.lock")))


def run_folders(folder: Path) -> list[Path]:
    """The folders of runs below ``folder``, in the order of their names."""
    found = {path.parent for name in _SIGNS for path in folder.rglob(name)}
    return sorted(found, key=lambda path: [(len(part), part) for part in path.parts])


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, of a run that goes on too.

    Raises:
        DataError: If one of its files is damaged.
    """
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8") if (folder / CONFIG).is_file() else ""
        config = read_yaml(text) or {}
        events = tuple(read_events(folder)) if (folder / EVENTS_FILE).is_file() else ()
        manifest = _json(folder / "adapters" / "last" / MANIFEST_FILE)
        losses = read_losses(folder)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ResultFileError(f"{folder} cannot be read as a run: {type(error).__name__}: {error}") from error
    remarks: list[str] = []
    batch_probe = _probe(BatchProbeResult, folder / PROBE_FILE, remarks)
    rank_probe = _probe(RankProbeResult, folder / RANK_PROBE_FILE, remarks)
    files = tuple(_files(folder))
    return RunRecord(
        folder,
        config,
        text,
        losses,
        events,
        manifest,
        batch_probe,
        rank_probe,
        tuple(remarks),
        files,
        is_running(folder),
    )


def _probe(kind: type[Probe], file: Path, remarks: list[str]) -> Probe | None:
    """The result of a probe; a remark, and None, if the file is damaged or of another version."""
    if not file.is_file():
        return None
    try:
        return kind.load(file)
    except DataError as error:
        remarks.append(str(error))
        return None


def _files(folder: Path) -> Iterator[SavedFile]:
    """Adapter folders and checkpoints, with the hashes that their manifests hold."""
    for manifest in sorted(folder.glob(f"adapters/*/{MANIFEST_FILE}")):
        for name, (size, digest) in sorted(_hashes(_json(manifest).get("files")).items()):
            yield SavedFile(f"adapters/{manifest.parent.name}/{name}", size, digest)
    for file in sorted(folder.glob("checkpoints/*.ckpt")):
        if file.is_file():
            versions = _json(file.with_name(f"{file.name}.manifest.json")).get("versions") or [{}]
            size = file.stat().st_size
            digest = next((each["sha256"] for each in reversed(versions) if each.get("size") == size), "")
            yield SavedFile(f"checkpoints/{file.name}", size, digest)


def _hashes(files: Any) -> dict[str, tuple[int, str]]:
    if not isinstance(files, Mapping):
        return {}
    return {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
