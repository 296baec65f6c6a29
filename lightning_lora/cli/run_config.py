"""The resolved config of a run, written beside the other files of the run."""

from __future__ import annotations

import os
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from lightning_lora.trainer_access import run_folder


class RunConfig(SaveConfigCallback):
    """Writes the config into the run folder.

    Lightning's own callback takes the folder of the logger, which two runs may share, or which does not exist.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"save_to_log_dir": False}))
        self._folder = ""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the folder, which all ranks must do; Lightning then calls `save_config` on the first rank."""
        self._folder = run_folder(trainer)
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the config."""
        get_filesystem(self._folder).makedirs(self._folder, exist_ok=True)
        path = os.path.join(self._folder, self.config_filename)
        self.parser.save(self.config, path, skip_none=False, overwrite=self.overwrite, multifile=self.multifile)
