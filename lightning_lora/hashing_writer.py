"""``torch.save`` into a file whose SHA-256 is known when the last byte is written, without reading it again."""

from __future__ import annotations

import hashlib
from typing import Any, BinaryIO

import torch


class HashingWriter:
    """What ``torch.save`` needs of a file; it writes from front to back, so the digest is that of the file.

    Args:
        file: Where the bytes go.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None
        self._file = file

    def write(self, piece: bytes | memoryview) -> int:
        """Pass the bytes on and count them in; an error is kept, for torch covers it by one of its own."""
        try:
            self._file.write(piece)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(piece)
        self.size += memoryview(piece).nbytes
        return memoryview(piece).nbytes

    def flush(self) -> None:
        """Push what is buffered to the file."""
        self._file.flush()


def save_hashed(checkpoint: dict[str, Any], writer: HashingWriter) -> None:
    """``torch.save`` that raises what went wrong with the file.

    Raises:
        OSError: If a write failed.
    """
    try:
        torch.save(checkpoint, writer)  # pyright: ignore[reportArgumentType] - write and flush are all it calls
    except RuntimeError:
        # Closing the half-written archive fails too, and hides what came first.
        if writer.error is not None:
            raise writer.error from None
        raise
