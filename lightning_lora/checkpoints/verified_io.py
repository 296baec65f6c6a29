"""Lightning checkpoints that are old or new, never a mix, and are looked at before they are used."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from typing_extensions import override

from lightning_lora.checkpoints.fallback import choose_checkpoint
from lightning_lora.checkpoints.shards import is_folder_of_shards, read_shards
from lightning_lora.files.atomic import atomic_file
from lightning_lora.files.checkpoint_manifest import (
    CheckpointVersion,
    manifest_of,
    other_libraries,
    present_versions,
    write_manifest,
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
StrPath = str | Path


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, says beside it what it must be, and verifies that before loading.

    Written to a temporary file in the same folder, synced to the disk, then renamed; a crash, a kill or a full disk
    leaves the old file as it was. The manifest ``NAME.manifest.json`` holds size, SHA-256, step and library versions.

    A damaged file is not loaded. Where the folder holds a whole checkpoint of the same run, of the same step or an
    earlier one, the latest of these is loaded instead, with a warning that names both; otherwise it is an error. A file
    without manifest (of plain Lightning) is checked by its own checksums and loaded with a remark.

    Use it as ``Trainer(plugins=[VerifiedCheckpointIO()])``, or around a thread of Lightning's
    ``AsyncCheckpointIO(VerifiedCheckpointIO())``, which may remove the previous checkpoint before the new one is whole.
    `CheckpointGuard`, our tasks and the command line use it unless told otherwise. Folders of shards (``FSDPStrategy``
    and ``ModelParallelStrategy`` in that mode, DeepSpeed) and remote addresses stay Lightning's own: neither atomic nor
    verified. Those of the first two are read here for the strategies that cannot (one device, DDP).

    Args:
        fall_back: Whether another checkpoint may be loaded in place of a damaged one. False: always an error.
    """

    def __init__(self, fall_back: bool = True) -> None:
        self.fall_back = fall_back
        # Other weights than asked for are no answer of a test; only who knows the stage can tell.
        self.is_resuming = True
        # Name and SHA-256 of the file that was loaded last.
        self.loaded: tuple[str, str | None] | None = None
        self._run = secrets.token_hex(8)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: StrPath, storage_options: Any | None = None) -> None:
        """Replace ``path`` by ``checkpoint`` in one step.

        Raises:
            OSError: If the folder is not writable or the disk is full; what was there is untouched.
        """
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = _local(path)
        before = present_versions(path)
        with _space_explained(path, checkpoint), _no_orphan(path), atomic_file(path, keep_link=False) as file:
            writer = HashingWriter(file)
            save_hashed(checkpoint, writer)
            # On the disk before the manifest speaks of it.
            os.fsync(file.fileno())
            version = self._version(checkpoint, writer)
            write_manifest(path, [*before, version])
        if before:
            write_manifest(path, [version])

    @override
    def load_checkpoint(
        self,
        path: StrPath,
        map_location: Any | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verify ``path``, then load it, or where it is damaged the last whole checkpoint beside it.

        Args:
            path: The file, or a folder of shards.
            map_location: As in ``torch.load``.
            weights_only: None: True, from remote addresses too.

        Raises:
            FileNotFoundError: If there is no such file.
            AdapterFileError: If it is damaged, and nothing whole is beside it.
        """
        weights_only = True if weights_only is None else weights_only
        if not is_local(path):
            return super().load_checkpoint(path, map_location, weights_only)
        local = _local(path)
        if is_folder_of_shards(local):
            rank_zero_info(f"{path} is a folder of shards: every process reads all of it.")
            return read_shards(local)
        if local.is_dir():
            return super().load_checkpoint(path, map_location, weights_only)
        chosen = choose_checkpoint(local, self.fall_back and self.is_resuming)
        whole, version = chosen.path, chosen.version
        if self.is_resuming and (others := other_libraries(whole)):
            rank_zero_warn(f"{whole} was written with {', '.join(others)}: the run need not go on exactly.")
        if version is not None and version.run:
            self._run = version.run
        self.loaded = (whole.name, None if version is None else version.sha256)
        return super().load_checkpoint(whole, map_location, weights_only)

    @override
    def remove_checkpoint(self, path: StrPath) -> None:
        """Remove a checkpoint, then its manifest."""
        super().remove_checkpoint(path)
        if is_local(path):
            manifest_of(_local(path)).unlink(missing_ok=True)

    def _version(self, checkpoint: dict[str, Any], writer: HashingWriter) -> CheckpointVersion:
        # What is no checkpoint (the weights that spawned processes hand back) has no step.
        return CheckpointVersion(
            sha256=writer.digest.hexdigest(),
            size=writer.size,
            step=int(checkpoint.get("global_step", 0)),
            epoch=int(checkpoint.get("epoch", 0)),
            run=self._run,
            is_resumable="optimizer_states" in checkpoint,
        )


def use_verified_checkpoints(trainer: Trainer) -> None:
    """Give ``trainer`` a `VerifiedCheckpointIO`, unless it was given a CheckpointIO already."""
    if trainer.strategy._checkpoint_io is None:  # the property would make Lightning's own
        trainer.strategy.checkpoint_io = VerifiedCheckpointIO()


def verified_io(trainer: Trainer) -> VerifiedCheckpointIO | None:
    """The `VerifiedCheckpointIO` of ``trainer``, also one inside of an ``AsyncCheckpointIO``."""
    io = trainer.strategy.checkpoint_io
    io = getattr(io, "checkpoint_io", io)
    return io if isinstance(io, VerifiedCheckpointIO) else None


def is_local(path: StrPath) -> bool:
    """Whether a path is on a disk of this machine, as far as Lightning is concerned."""
    return isinstance(get_filesystem(path), LocalFileSystem)


def _local(path: StrPath) -> Path:
    """The path without ``file://``, its folders real and its own name kept, be it that of a link."""
    path = Path(LocalFileSystem._strip_protocol(str(path)))
    return Path(os.path.realpath(path.parent)) / path.name


@contextmanager
def _no_orphan(path: Path) -> Generator[None, None, None]:
    """Leave no manifest of a file that was not put in place."""
    try:
        yield
    except BaseException:
        if not os.path.lexists(path):
            manifest_of(path).unlink(missing_ok=True)
        raise


@contextmanager
def _space_explained(path: Path, checkpoint: dict[str, Any]) -> Generator[None, None, None]:
    """Say what a full disk lacks."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)}: a checkpoint needs about {_tensor_bytes(checkpoint) / 1e6:,.1f} MB, "
            f"{free:,.1f} MB are free on the disk. Earlier checkpoints are untouched",
            str(path),
        ) from error


def _tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested containers, each storage once."""
    storages: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> None:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    apply_to_collection(content, torch.Tensor, count)
    return sum(storages.values())


class HashingWriter:
    """What ``torch.save`` needs of a file; it writes from front to back, so the digest is that of the file.

    Args:
        file: Where the bytes go.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None
        self._file = file

    def write(self, piece: bytes | memoryview) -> int:
        """Pass the bytes on and count them in; an error is kept, for torch covers it by one of its own."""
        try:
            self._file.write(piece)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(piece)
        self.size += memoryview(piece).nbytes
        return memoryview(piece).nbytes

    def flush(self) -> None:
        """Push what is buffered to the file."""
        self._file.flush()


def save_hashed(checkpoint: dict[str, Any], writer: HashingWriter) -> None:
    """``torch.save`` that raises what went wrong with the file.

    Raises:
        OSError: If a write failed.
    """
    try:
        torch.save(checkpoint, writer)  # pyright: ignore[reportArgumentType] - write and flush are all it calls
    except RuntimeError:
        # Closing the half-written archive fails too, and hides what came first.
        if writer.error is not None:
            raise writer.error from None
        raise
