"""One checkpoint file from a folder of shards: ``python -m lightning_lora.checkpoints.consolidate FOLDER FILE``."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_lora.checkpoints.shards import is_folder_of_shards, read_shards
from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO
from lightning_lora.errors import AdapterFileError, LoRAError


def consolidate(folder: str | Path, file: str | Path) -> Path:
    """Write the checkpoint that sharded strategies have left in ``folder`` as one file, which every strategy reads.

    The whole checkpoint passes through the memory of this process.

    Args:
        folder: Written by ``ModelParallelStrategy`` or ``FSDPStrategy(state_dict_type="sharded")``.
        file: Written whole or not at all, with its manifest.

    Returns:
        The file.

    Raises:
        AdapterFileError: If ``folder`` is no such folder, or damaged.
        FileExistsError: If ``file`` is there already.
    """
    folder, file = Path(folder), Path(file)
    if not is_folder_of_shards(folder):
        raise AdapterFileError(f"{folder} is no folder of shards that Lightning has written.")
    if file.exists():
        raise FileExistsError(f"{file} exists already.")
    VerifiedCheckpointIO().save_checkpoint(read_shards(folder), file)
    return file


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lightning_lora.checkpoints.consolidate FOLDER FILE")
    try:
        print(f"written: {consolidate(*sys.argv[1:])}")
    except (LoRAError, OSError) as problem:
        sys.exit(f"error: {problem}")
