"""What merging on disk did to each stored tensor, and what rounding took of each update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerCertificate:
    """Numeric error of one merged tensor.

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
            f"{len(self.layers)} layers merged in float32; rounding to the stored type changed a weight by at most "
            f"{error:.2e} and took at most {worst.delta_error:.2%} of an update ({worst.weight})"
        )


class RoundingError:
    """Maximum and norm of the error of a tensor that is merged block by block."""

    def __init__(self) -> None:
        self._largest = torch.zeros((), dtype=torch.float64)
        self._lost = torch.zeros((), dtype=torch.float64)
        self._update = torch.zeros((), dtype=torch.float64)

    def add(self, weight: Tensor, update: Tensor, stored: Tensor) -> None:
        """Count a block.

        Args:
            weight: Of the base.
            update: Exact, in float64; overwritten.
            stored: What is written for their sum.
        """
        self._update += update.square().sum()
        error = stored.double().sub_(update.add_(weight))
        self._largest = torch.maximum(self._largest, error.abs().max())
        self._lost += error.square_().sum()

    def certificate(self, weight: str) -> LayerCertificate:
        """The error of the whole tensor, called ``weight``."""
        lost = float((self._lost / self._update).sqrt()) if self._update else 0.0
        return LayerCertificate(weight, float(self._largest), lost)
