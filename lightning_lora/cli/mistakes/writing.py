"""A file or folder that cannot be written."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

from lightning_lora.errors import CommandError, LoRAError


@contextmanager
def writing(what: str | PathLike[str], error: type[LoRAError] = CommandError) -> Iterator[None]:
    """Turn an `OSError` of the block, such as a full disk, into an error that says what cannot be written.

    Args:
        what: The file or folder, with the name of its option where it has one.
        error: What is raised.

    Raises:
        CommandError: Or ``error``, if the block raises an `OSError`.
    """
    try:
        yield
    except OSError as failure:
        raise error(f"{what} cannot be written: {failure.strerror or failure}.") from failure


@contextmanager
def full_disk(what: str | PathLike[str]) -> Iterator[None]:
    """Turn a full disk, within the context, into an error that names what cannot be written; other errors stay.

    Args:
        what: The file or folder, with the name of its option where it has one.

    Raises:
        CommandError: If the disk, or the quota of the user, is full.
    """
    try:
        yield
    except Exception as failure:
        # safetensors writes in another language, and its error has the number in its text only.
        words = f"os error {errno.ENOSPC}"
        if getattr(failure, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and words not in str(failure):
            raise
        raise CommandError(
            f"{what} cannot be written: the disk is full. Free some space, or choose another place; what was there "
            "before is as it was."
        ) from failure
