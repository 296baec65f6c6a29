"""A file or folder that cannot be written."""

from __future__ import annotations

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
