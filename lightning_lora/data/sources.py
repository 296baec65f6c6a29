"""Sources of rows: files on disk and datasets of the hub, distinguished before anything is opened."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.reading import COMPRESSED_INSIDE, COMPRESSIONS, SUFFIXES, Row, file_kind, read_rows
from lightning_lora.data.terminal_progress import progress_on_terminals
from lightning_lora.errors import DataFileError
from lightning_lora.hub import offline_hint, prepare_hub

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")


@dataclass(frozen=True)
class FileSource:
    """One file on disk.

    Args:
        name: The path as given by the user, or as found by a glob.
    """

    name: str

    def identity(self) -> list[Any]:
        """A key that changes if the rows may have changed: absolute path, size in bytes, modification time in ns."""
        status = os.stat(self.name)
        return [os.path.abspath(self.name), status.st_size, status.st_mtime_ns]

    @property
    def is_document(self) -> bool:
        """Whether the file is one text that fills as many rows of tokens as it needs."""
        return file_kind(Path(self.name)) == ".txt"

    def rows(self) -> Generator[Row | RowError, None, None]:
        """Read the rows in file order."""
        return read_rows(Path(self.name))

    def stream(self) -> Generator[Row | RowError, None, None]:
        """Read the rows in file order; a file is never held in memory as a whole, unless it is one JSON list."""
        return self.rows()


@dataclass(frozen=True)
class HubSource:
    """One split of a dataset of the Hugging Face hub. The dataset's own code is never run.

    Args:
        name: Name on the hub, ``owner/name``.
        config: Configuration of the dataset; None if it has only one.
        split: Name of the split.
    """

    name: str
    config: str | None
    split: str
    is_document = False

    def load(self) -> datasets.Dataset:
        """Download the split, or take it from the cache."""
        return self._load(streaming=False)

    def identity(self) -> list[Any]:
        """A key that changes if the rows may have changed: name and fingerprint of the downloaded revision."""
        return [self.name, self.config, self.split, self.load()._fingerprint]

    def rows(self) -> Generator[Row, None, None]:
        """Download the split and read its rows in order."""
        return self._rows(self.load())

    def stream(self) -> Generator[Row, None, None]:
        """Read the rows in the order of the split while they are downloaded; nothing is kept on disk."""
        index = -1
        rows = self._rows(self._load(streaming=True))
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # network, a damaged file: each library raises its own
                after = f" after row {index}" if index >= 0 else ""
                raise DataFileError(
                    f"{self.name}:{self.split} cannot be read{after}: {error}. Is it damaged, or the hub out of reach?"
                ) from error
            if row is None:
                return
            index += 1
            yield row

    def _load(self, streaming: bool) -> Any:
        prepare_hub(self.name)
        try:
            with progress_on_terminals():
                return datasets.load_dataset(self.name, self.config, split=self.split, streaming=streaming)
        except Exception as error:  # network, unknown name, missing configuration: each library raises its own
            raise DataFileError(
                f"{self.name!r} is not a file on disk, and split {self.split!r} of a hub dataset of that name cannot "
                f"be loaded: {error}. Give a path, or 'owner/name', 'owner/name:split' or 'owner/name:config:split'."
                f"{offline_hint(self.name)}"
            ) from error

    def _rows(self, loaded: datasets.Dataset | datasets.IterableDataset) -> Generator[Row, None, None]:
        index = 0
        for batch in loaded.iter(batch_size=1000):  # much faster than one row after the other
            assert isinstance(batch, dict)
            for values in zip(*batch.values(), strict=True):
                yield Row(f"{self.name}:{self.split}, row {index}", dict(zip(batch, values, strict=True)))
                index += 1


def is_path_like(name: str) -> bool:
    """Whether a name can only be a path: a glob, a known suffix, a root, or a folder that exists."""
    parent = Path(name).parent
    return (
        glob.has_magic(name)
        or name.startswith((".", "~", os.sep))
        or file_kind(Path(name)) is not None
        or _HUB_NAME.fullmatch(name) is None
        or (parent != Path() and parent.is_dir())
    )


def find_sources(names: str | list[str], split: str) -> list[FileSource | HubSource]:
    """Find the sources that the user named, in the order given; files of a glob in alphabetical order.

    Args:
        names: Files, globs (``**`` matches subfolders) or hub names.
        split: Split of hub datasets whose name does not include one.

    Raises:
        DataError: If a file does not exist, is a folder or of an unknown kind, or if a glob matches nothing.
    """
    names = [names] if isinstance(names, (str, os.PathLike)) else list(names)
    if not names:
        raise DataFileError(f"{split} is an empty list; name at least one file or hub dataset, or leave {split} out.")
    return [source for name in names for source in _sources_of(os.path.expanduser(os.fspath(name)), split)]


def _sources_of(name: str, split: str) -> list[FileSource | HubSource]:
    if not os.path.exists(name) and not is_path_like(name):
        hub_name, *rest = name.split(":")
        return [HubSource(hub_name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else split)]
    files = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
    if not files:
        what = "matches no file" if glob.has_magic(name) else "does not exist"
        raise DataFileError(f"{name!r} {what} (looked from {os.getcwd()}).")
    for file in files:
        if os.path.isdir(file):
            raise DataFileError(
                f"{file!r} is a folder; name the files in it, for example '{file.rstrip('/')}/*.jsonl'."
            )
        if file_kind(Path(file)) is None:
            raise DataFileError(
                f"{file!r} is of an unknown kind; known kinds: {', '.join(SUFFIXES)}, and all but "
                f"{' and '.join(COMPRESSED_INSIDE)} with {' or '.join(COMPRESSIONS)}."
            )
    return [FileSource(file) for file in files]
