"""Memory that is used again for every block."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Tensors to write into, one for each use and type.

    The contents of a tensor are lost when the same use and type is asked for again. Fresh memory comes from the system
    page by page, zeroed; for a block, this can take four times as long as computing its sum.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor for ``use``, with arbitrary contents."""
        num_elements = torch.Size(shape).numel()
        held = self._held.get((use, dtype))
        if held is None or held.numel() < num_elements:
            held = self._held[use, dtype] = torch.empty(num_elements, dtype=dtype)
        return held[:num_elements].view(shape)
