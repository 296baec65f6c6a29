"""A lock that keeps a second run out of a run folder."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_lora.errors import RunFolderError
from lightning_lora.files.folder_lock import release_lock, take_lock
from lightning_lora.trainer_access import shared_folder


class RunLock(Callback):
    """Refuses a second ``fit`` that would write in the folder of a running one.

    The lock is a file with the process, the host and the start time: ``.run.lock`` in the folder of the checkpoints,
    or, with a CSV or TensorBoard logger, ``.version_0.lock`` beside its folder. It is removed when the run ends,
    with an error too. A lock whose process is dead is taken over with a warning. A process on another host cannot
    be checked: its lock is respected until somebody deletes the file.

    A CSV logger that is given the folder of another run deletes the ``metrics.csv`` in it before any callback runs. The
    command line therefore calls `acquire` before ``fit``; a script can do the same.

    Raises:
        RunFolderError: On all ranks, with process, host and age of the lock.
    """

    def __init__(self) -> None:
        self._path: Path | None = None

    def acquire(self, trainer: Trainer) -> None:
        """Take the lock on the first rank; on other ranks, and in a second call, do nothing."""
        if self._path is not None or not trainer.is_global_zero or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        path, folder = _lock_and_folder(trainer)
        if ":/" in str(folder):
            rank_zero_warn(f"RunLock does nothing: {folder} is not a folder of a file system.")
            return
        remark = take_lock(path, folder)
        self._path = path
        if remark is not None:
            rank_zero_warn(remark)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the lock before other callbacks write."""
        if stage != "fit":
            return
        refusal: str | None = None
        try:
            self.acquire(trainer)
        except RunFolderError as error:
            refusal = str(error)
        # All ranks must stop: the others would wait for the first one.
        refusal = trainer.strategy.broadcast(refusal)
        if refusal is not None:
            raise RunFolderError(refusal)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the lock."""
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the lock."""
        self._release()

    def _release(self) -> None:
        if self._path is not None:
            release_lock(self._path)
            self._path = None


def _lock_and_folder(trainer: Trainer) -> tuple[Path, Path]:
    """The file of the lock and the folder that it protects."""
    # Not run_folder: that is a collective, and only the first rank calls this.
    folder = Path(shared_folder(trainer)[0])
    if isinstance(trainer.logger, (CSVLogger, TensorBoardLogger)):
        # Beside the folder: these loggers warn of a folder that is not empty.
        return folder.parent / f".{folder.name}.lock", folder
    # Inside: this folder may be any, even a home folder, whose parent cannot be written.
    return folder / ".run.lock", folder
