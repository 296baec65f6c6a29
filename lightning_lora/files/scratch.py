"""Memory used again for block after block."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Tensors to write into, one for each use and type; what one held is lost when it is asked for again.

    The system hands out fresh memory page by page, zeroed: for a block, that can take four times as long as its sum.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor for ``use``, of any content."""
        num_elements = torch.Size(shape).numel()
        held = self._held.get((use, dtype))
        if held is None or held.numel() < num_elements:
            held = self._held[use, dtype] = torch.empty(num_elements, dtype=dtype)
        return held[:num_elements].view(shape)
