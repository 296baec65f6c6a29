"""Choose the last whole checkpoint instead of a damaged one, and tell the user."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_lora.files.whole_checkpoint import WholeCheckpoint, whole_checkpoint


def choose_checkpoint(path: Path, fall_back: bool = True) -> WholeCheckpoint:
    """Choose as `whole_checkpoint` does, with a warning if another file replaces ``path``.

    Raises:
        FileNotFoundError: If the file does not exist.
        AdapterFileError: If it is damaged, and no whole checkpoint is beside it or ``fall_back`` is False.
    """
    chosen = whole_checkpoint(path, fall_back)
    if chosen.remark is not None:
        (rank_zero_info if chosen.stands_for is None else rank_zero_warn)(chosen.remark)
    return chosen
