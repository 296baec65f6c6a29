"""Falling back to the last whole checkpoint, and saying so."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_lora.files.whole_checkpoint import WholeCheckpoint, whole_checkpoint


def choose_checkpoint(path: Path, fall_back: bool = True) -> WholeCheckpoint:
    """`whole_checkpoint`, with a warning if another file stands for ``path``.

    Raises:
        FileNotFoundError: If there is no such file.
        AdapterFileError: If it is damaged, and nothing whole is beside it or ``fall_back`` is false.
    """
    chosen = whole_checkpoint(path, fall_back)
    if chosen.remark is not None:
        (rank_zero_info if chosen.stands_for is None else rank_zero_warn)(chosen.remark)
    return chosen
