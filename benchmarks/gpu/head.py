"""Output layer and loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.place import Place, milliseconds
from lightning_lora.tasks.head_loss import head_loss


def head(place: Place) -> dict[str, Any]:
    """Output layer and loss: by rows of a chunk, against cross_entropy over all scores."""
    for width, vocab in place.pick(((2048, 128256), (4096, 128256), (2048, 32000)), ((64, 97),)):
        row = {}
        for way, call in _ways(place, width, vocab).items():
            place.fresh()
            row[way] = [round(milliseconds(place, call, 8, 3), 2), round(place.peak(), 2)]
        place.found[f"d {width}, vocab {vocab}: ms, GiB"] = row
    return place.found


def _ways(place: Place, width: int, vocab: int) -> dict[str, Callable[[], object]]:
    tokens = place.pick(8192, 64)
    hidden = torch.randn(tokens, width, device=place.device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device=place.device, dtype=torch.bfloat16) / width**0.5
    labels = torch.randint(vocab, (tokens,), device=place.device)

    def usual() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight).float(), labels), hidden)

    def ours(rows: int) -> None:
        torch.autograd.grad(head_loss(hidden, weight, labels, chunk_rows=rows), hidden)

    chunks = place.pick((256, 512, 1024, 2048, 4096, 8192), (16, 64))
    return {
        "cross_entropy": usual,
        "products alone": lambda: (hidden @ weight.T) @ weight,
        **{f"chunks of {rows}": partial(ours, rows) for rows in chunks},
    }
