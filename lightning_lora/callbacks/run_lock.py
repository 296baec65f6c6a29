"""One run per folder."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_lora.errors import RunFolderError
from lightning_lora.files.folder_lock import release_lock, take_lock


class RunLock(Callback):
    """Refuses a second ``fit`` that would write in the folder of a running one.

    The lock is a file with process, host and start time: ``.run.lock`` in the run folder, or beside the folder of a
    CSV or TensorBoard logger, ``.version_0.lock``. It goes when the run ends, by an error too. A lock whose process is
    dead is taken over with a warning. Whether a process on another host lives cannot be known: its lock is respected
    until somebody deletes the file.

    Before any callback runs, a CSV logger that is given the folder of another run deletes its ``metrics.csv``. The
    command line therefore calls `acquire` before ``fit``, and so can you.

    Raises:
        RunFolderError: Naming process, host and age of the lock; on all ranks.
    """

    def __init__(self) -> None:
        self._path: Path | None = None

    def acquire(self, trainer: Trainer) -> None:
        """Take the lock on the first rank; the others, and a second call, do nothing."""
        if self._path is not None or not trainer.is_global_zero or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        path, folder = _lock_and_folder(trainer)
        if ":/" in str(folder):
            rank_zero_warn(f"RunLock does nothing: {folder} is no folder of a file system.")
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
        # The others must not wait for a first rank that has left.
        refusal = trainer.strategy.broadcast(refusal)
        if refusal is not None:
            raise RunFolderError(refusal)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the folder free."""
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the folder free."""
        self._release()

    def _release(self) -> None:
        if self._path is not None:
            release_lock(self._path)
            self._path = None


def _lock_and_folder(trainer: Trainer) -> tuple[Path, Path]:
    # Not trainer.log_dir: that is a collective, and only the first rank is here.
    logger = trainer.logger
    if isinstance(logger, (CSVLogger, TensorBoardLogger)):
        folder = Path(logger.log_dir)
        # Beside the folder: these loggers warn of one that is not empty.
        return folder.parent / f".{folder.name}.lock", folder
    # Inside: this folder may be anything, somebody's home too.
    folder = Path((logger.save_dir if logger is not None else None) or trainer.default_root_dir)
    return folder / ".run.lock", folder
