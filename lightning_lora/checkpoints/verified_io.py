"""Lightning checkpoints that are written whole or not at all, and verified before they are loaded."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
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

from lightning_lora.checkpoints.ckpt_path import refuse_other_files
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
from lightning_lora.files.lightning_checkpoint import unsafe_checkpoint

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
StrPath = str | Path


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint atomically with a manifest beside it, and verifies it against the manifest before loading.

    A checkpoint is written to a temporary file in the same folder, synced to the disk and then renamed. After a crash,
    a kill or a full disk the old file is unchanged. The manifest ``NAME.manifest.json`` holds size, SHA-256, step and
    library versions.

    A damaged file is not loaded. If the folder holds whole checkpoints of the same run, of the same step or an earlier
    one, the latest of them is loaded instead, with a warning that names both files; otherwise it is an error. A file
    without a manifest (of plain Lightning) is checked by its own checksums and loaded with a remark.

    Use it as ``Trainer(plugins=[VerifiedCheckpointIO()])``. Inside ``AsyncCheckpointIO(VerifiedCheckpointIO())`` it
    writes in a thread, and Lightning may remove the previous checkpoint before the new one is complete.
    `CheckpointGuard`, our tasks and the command line use it by default.

    Lightning itself writes folders of shards (``FSDPStrategy`` and ``ModelParallelStrategy`` in that mode, DeepSpeed)
    and remote addresses; these are neither atomic nor verified. Folders of the first two are read here for strategies
    that cannot read them (one device, DDP).

    Args:
        fall_back: Whether another checkpoint may be loaded instead of a damaged one. False: always an error.

    Attributes:
        is_resuming: Whether a run resumes from what is loaded. False forbids falling back as well: a test of other
            weights would not answer the question. `CheckpointGuard` sets it.
        loaded: Name and SHA-256 of the file that was loaded last; None before that.
    """

    def __init__(self, fall_back: bool = True) -> None:
        self.fall_back = fall_back
        self.is_resuming = True
        self.loaded: tuple[str, str | None] | None = None
        self._run = secrets.token_hex(8)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: StrPath, storage_options: Any | None = None) -> None:
        """Replace ``path`` by ``checkpoint`` in one step.

        Raises:
            OSError: If the folder is not writable or the disk is full; the old file is unchanged.
        """
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = _local(path)
        before = present_versions(path)
        with _explained_full_disk(path, checkpoint), _no_orphan(path), atomic_file(path, keep_link=False) as file:
            written = _HashedFile(file)
            written.save(checkpoint)
            # The bytes must be on the disk before the manifest describes them.
            os.fsync(file.fileno())
            version = self._version(checkpoint, written)
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
        """Verify ``path`` and load it; if it is damaged, load the last whole checkpoint beside it.

        Args:
            path: A file, or a folder of shards.
            map_location: Device of the loaded tensors, as in ``torch.load``.
            weights_only: Whether only plain types are loaded, as in ``torch.load``. None: True, also from remote
                addresses.

        Raises:
            FileNotFoundError: If the file does not exist.
            AdapterFileError: If it is no checkpoint, holds more than plain values, or is damaged with no whole
                checkpoint beside it.
        """
        weights_only = True if weights_only is None else weights_only
        if not is_local(path):
            return super().load_checkpoint(path, map_location, weights_only)
        local = _local(path)
        if is_folder_of_shards(local):
            rank_zero_info(f"{path} is a folder of shards: every process reads all of it.")
            return read_shards(local)
        refuse_other_files(local)
        chosen = choose_checkpoint(local, self.fall_back and self.is_resuming)
        whole, version = chosen.path, chosen.version
        if self.is_resuming and (others := other_libraries(whole)):
            rank_zero_warn(f"{whole} was written with {', '.join(others)}: the run may not continue exactly.")
        if version is not None and version.run:
            self._run = version.run
        self.loaded = (whole.name, None if version is None else version.sha256)
        try:
            return super().load_checkpoint(whole, map_location, weights_only)
        except pickle.UnpicklingError as error:
            raise unsafe_checkpoint(whole, error) from error

    @override
    def remove_checkpoint(self, path: StrPath) -> None:
        """Remove a checkpoint, then its manifest."""
        super().remove_checkpoint(path)
        if is_local(path):
            manifest_of(_local(path)).unlink(missing_ok=True)

    def _version(self, checkpoint: dict[str, Any], written: _HashedFile) -> CheckpointVersion:
        # Lightning also saves the weights that spawned processes hand back; these have no step.
        return CheckpointVersion(
            sha256=written.digest.hexdigest(),
            size=written.size,
            step=int(checkpoint.get("global_step", 0)),
            epoch=int(checkpoint.get("epoch", 0)),
            run=self._run,
            is_resumable="optimizer_states" in checkpoint,
        )


def use_verified_checkpoints(trainer: Trainer) -> None:
    """Give ``trainer`` a `VerifiedCheckpointIO`, unless it already has a CheckpointIO."""
    if trainer.strategy._checkpoint_io is None:  # the public property would create Lightning's own
        trainer.strategy.checkpoint_io = VerifiedCheckpointIO()


def verified_io(trainer: Trainer) -> VerifiedCheckpointIO | None:
    """The `VerifiedCheckpointIO` of ``trainer``, also inside an ``AsyncCheckpointIO``; None if it has none."""
    io = trainer.strategy.checkpoint_io
    io = getattr(io, "checkpoint_io", io)
    return io if isinstance(io, VerifiedCheckpointIO) else None


def is_local(path: StrPath) -> bool:
    """Whether Lightning takes ``path`` for one on a disk of this machine."""
    return isinstance(get_filesystem(path), LocalFileSystem)


def _local(path: StrPath) -> Path:
    """Strip ``file://`` and resolve links among the parent folders; the last name may be that of a link."""
    path = Path(LocalFileSystem._strip_protocol(str(path)))
    return Path(os.path.realpath(path.parent)) / path.name


class _HashedFile:
    """A file for ``torch.save`` that hashes what is written; ``torch.save`` never seeks."""

    def __init__(self, file: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self._error: OSError | None = None
        self._file = file

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write ``checkpoint``; an `OSError` of the file is raised as it is."""
        try:
            torch.save(checkpoint, self)  # pyright: ignore[reportArgumentType] - it only calls write and flush
        except RuntimeError:
            # torch fails to close the half-written archive, and raises that error instead of the first one.
            if self._error is not None:
                raise self._error from None
            raise

    def write(self, piece: bytes | memoryview) -> int:
        try:
            self._file.write(piece)
        except OSError as error:
            self._error = error
            raise
        self.digest.update(piece)
        self.size += memoryview(piece).nbytes
        return memoryview(piece).nbytes

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def _no_orphan(path: Path) -> Generator[None, None, None]:
    """Remove the manifest if the block fails before the checkpoint exists."""
    try:
        yield
    except BaseException:
        if not os.path.lexists(path):
            manifest_of(path).unlink(missing_ok=True)
        raise


@contextmanager
def _explained_full_disk(path: Path, checkpoint: dict[str, Any]) -> Generator[None, None, None]:
    """Add needed and free space to the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
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
