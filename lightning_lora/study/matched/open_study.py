"""Begins a study in a folder and a database, or joins it; refuses those of another study, with nothing changed."""

from __future__ import annotations

import glob
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning_lora.files.atomic import sha256
from lightning_lora.study.matched.folder import check_folder, write_study
from lightning_lora.study.matched.record import RUNS
from lightning_lora.study.matched.spec import StudySpec
from lightning_lora.study.matched.store import LEASE_SECONDS, Store
from lightning_lora.versions import installed_version

DATABASE = "study.sqlite"
LIBRARIES = ("lightning-lora", "torch", "lightning", "transformers", "datasets", "numpy")


def open_study(
    spec: StudySpec, data: Mapping[str, str], folder: Path, storage: str | None, lease: float = LEASE_SECONDS
) -> Store:
    """Begin or join a study, and write ``study.yaml``.

    Args:
        storage: URL of the database; None for a SQLite file in the folder.
        lease: Seconds that a worker may be silent.

    Raises:
        ConfigError: If folder or database belong to something else, or cannot be used.
    """
    check_folder(folder, spec.name)
    store = Store(storage or f"sqlite:///{folder / DATABASE}", spec.name, lease)
    fixed = {
        "baseline": spec.baseline,
        "primary": spec.primary,
        "band": spec.band,
        "selection seeds": list(spec.selection_seeds),
        "learning_rate_option": spec.learning_rate_option,
        "data": dict(data),
        # A setting that is not used is as one that an older version did not know.
        "evaluations": spec.evaluations,
        "halving": spec.halving or None,
        "batch_penalty": {kind: dict(arms) for kind, arms in spec.batch_penalty.items()} or None,
    }
    store.open({"fixed": fixed, "arms": {arm.name: _hash(arm.config) for arm in spec.arms}})
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    write_study(folder, spec, _made(data))
    return store


def data_fingerprints(settings: Any) -> dict[str, str]:
    """The SHA-256 of each file that the settings of the data name, by its path; hub names are not followed."""
    found: dict[str, str] = {}
    for text in _texts(settings):
        try:
            files = [text] if Path(text).is_file() else sorted(glob.glob(text)) if glob.has_magic(text) else []
            found |= {file: sha256(file) for file in files if Path(file).is_file()}
        except (OSError, ValueError):  # a text that is no path at all
            continue
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(key)
            yield from _texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)


def _hash(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _made(data: Mapping[str, str]) -> dict[str, Any]:
    return {
        "command": shlex.join(["lightning-lora", *sys.argv[1:]] if "lightning" in sys.argv[0] else sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: installed_version(name) for name in LIBRARIES},
        "data_sha256": dict(data),
    }
