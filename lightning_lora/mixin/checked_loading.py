"""``load_from_checkpoint`` that refuses a file which would unpack to more than it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from typing_extensions import Self

from lightning_lora.files.lightning_checkpoint import refuse_packed


class CheckedLoading(LightningModule):
    """A LightningModule whose checkpoints are looked at before torch reads them."""

    @_restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # noqa: N805
        """Load a module from a checkpoint, as ``LightningModule.load_from_checkpoint`` does, with its arguments.

        Raises:
            AdapterFileError: If the file is packed: a small one could fill the memory.
        """
        is_file = hasattr(checkpoint_path, "seek")
        refuse_packed(checkpoint_path if is_file else Path(checkpoint_path))
        if is_file:
            checkpoint_path.seek(0)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
