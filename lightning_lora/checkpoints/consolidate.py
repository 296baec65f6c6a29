"""One checkpoint file made from a folder of shards."""

from __future__ import annotations

from pathlib import Path

from lightning_lora.checkpoints.shards import is_folder_of_shards, read_shards
from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO
from lightning_lora.errors import CheckpointFileError, OutputPlaceError


def consolidate(folder: str | Path, out: str | Path) -> Path:
    """Write the checkpoint in a folder of shards as one file, from which every strategy can resume.

    The whole checkpoint is held in the memory of this process. Nothing in the folder is unpickled.

    Args:
        folder: A checkpoint of ``ModelParallelStrategy`` or ``FSDPStrategy(state_dict_type="sharded")``.
        out: The file to write, whole or not at all, with its manifest ``OUT.manifest.json`` beside it.

    Returns:
        The path ``out``.

    Raises:
        AdapterFileError: If ``folder`` is not a folder of shards, or is damaged.
        OutputPlaceError: If ``out`` already exists.
        OSError: If ``out`` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    if not is_folder_of_shards(folder):
        raise CheckpointFileError(
            f"{folder} is not a folder of shards: give the folder that FSDPStrategy or ModelParallelStrategy has "
            "written as a checkpoint."
        )
    if out.exists():
        raise OutputPlaceError(f"{out} already exists: remove it, or choose another name.")
    VerifiedCheckpointIO().save_checkpoint(read_shards(folder), out)
    return out
