"""Held-out rows in two halves: one to choose learning rates on, the other for the verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def selection_rows(rows: Sequence[bytes | str]) -> NDArray[np.bool_]:
    """Whether each row is for selection: about half of them, by a hash of what is in the row.

    The same row is on the same side in every study, whatever the order, and so are its duplicates.

    Args:
        rows: The content of each row, such as its text or the bytes of its tokens.
    """
    contents = (row.encode() if isinstance(row, str) else row for row in rows)
    return np.array([hashlib.sha256(content).digest()[0] % 2 == 0 for content in contents], dtype=bool)
