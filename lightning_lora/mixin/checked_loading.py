"""``load_from_checkpoint`` that refuses a file which would unpack to more than it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from typing_extensions import Self

from lightning_lora.errors import CheckpointFileError
from lightning_lora.files.checkpoint_manifest import packed_parts


class CheckedLoading(LightningModule):
    """A LightningModule whose checkpoints are looked at before torch reads them."""

    @_restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # noqa: N805
        """Load a module from a checkpoint, as ``LightningModule.load_from_checkpoint`` does, with its arguments.

        Raises:
            AdapterFileError: If the file is packed: a small one could fill the memory.
        """
        is_file = hasattr(checkpoint_path, "seek")
        packed = packed_parts(checkpoint_path if is_file else Path(checkpoint_path))
        if is_file:
            checkpoint_path.seek(0)
        if packed:
            raise CheckpointFileError(f"{checkpoint_path} is damaged: {packed}.")
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
