"""What merging on disk did to each stored tensor, and what rounding took of each update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerCertificate:
    """Numeric error of one merged tensor.

    Exact means in float64 where the output is float32 or wider. Where it is narrower it means in float32, thousands of
    times finer than the rounding that is measured.

    Args:
        weight: Name of the merged tensor in the base checkpoint.
        max_error: Largest difference between the exact sum and what was stored, in weight units.
        delta_error: ``|stored change - exact change| / |exact change|``: what rounding took of the update.
    """

    weight: str
    max_error: float
    delta_error: float


@dataclass(frozen=True)
class MergeCertificate:
    """What a merge did: inputs by hash, type of the output, error of each tensor."""

    base: str
    adapter_sha256: str
    dtype: str | None
    layers: tuple[LayerCertificate, ...]

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: layer.delta_error)
        error = max(layer.max_error for layer in self.layers)
        return (
            f"{len(self.layers)} layers merged; rounding to the stored type changed a weight by at most "
            f"{error:.2e} and took at most {worst.delta_error:.2%} of an update ({worst.weight})"
        )


class BlockError(NamedTuple):
    """The error of some rows: its largest absolute value, and the squared norms of the error and of the update."""

    largest: float
    lost: float
    update: float


def block_error(weight: Tensor, update: Tensor, stored: Tensor) -> BlockError:
    """What rounding did to a block.

    Args:
        weight: Of the base; overwritten with the error.
        update: Exact.
        stored: What is written for their sum, in the type of the others.

    Returns:
        The error; its largest value is infinite or NaN if a value of the sum did not fit.
    """
    # In this order: where an update is small, the first difference is exact, and float32 sees even one that got lost.
    error = weight.sub_(stored).add_(update)
    low, high = error.aminmax()
    return BlockError(float(torch.maximum(-low, high)), _squares(error), _squares(update))


def layer_certificate(weight: str, blocks: Sequence[BlockError]) -> LayerCertificate:
    """The error of the tensor ``weight``, from those of its blocks."""
    largest, lost, update = torch.tensor(blocks, dtype=torch.float64).unbind(1)
    share = float((lost.sum() / update.sum()).sqrt()) if update.any() else 0.0
    return LayerCertificate(weight, float(largest.max()), share)


def _squares(block: Tensor) -> float:
    return float(torch.dot(block.reshape(-1), block.reshape(-1)))
