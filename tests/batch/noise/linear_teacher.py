"""A regression whose gradient moments have a closed form: ``x ~ N(0, I)``, ``y = W* x + sigma eps``, half squares.

Formulas of research/batch_and_capacity.md section 7 (oracle O1), derived from Gaussian moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LinearTeacher:
    """``E = W - W*`` is what a student still has to learn; its update is ``scale B A``."""

    error: Tensor
    A: Tensor
    B: Tensor
    scale: float
    sigma: float

    @classmethod
    def make(cls, num_outputs: int = 12, num_inputs: int = 10, rank: int = 4) -> LinearTeacher:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) / 3

        return cls(normal(num_outputs, num_inputs), normal(rank, num_inputs), normal(num_outputs, rank), 2.0, 0.5)

    def rows(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs ``(count, in)`` and gradients of the outputs ``(count, out)`` of fresh rows."""
        num_outputs, num_inputs = self.error.shape
        x = torch.randn(count, num_inputs, generator=generator, dtype=torch.float64)
        noise = torch.randn(count, num_outputs, generator=generator, dtype=torch.float64)
        return x, x @ self.error.T - self.sigma * noise

    @property
    def weight_noise_scale(self) -> float:
        num_outputs, num_inputs = self.error.shape
        square = self.error.square().sum()
        return float(((num_inputs + 1) * square + self.sigma**2 * num_outputs * num_inputs) / square)

    @property
    def adapter_noise_scale(self) -> float:
        num_outputs, num_inputs = self.error.shape
        square = self.error.square().sum()
        through_A, through_B = (self.error @ self.A.T).square().sum(), (self.B.T @ self.error).square().sum()
        size_A, size_B = self.A.square().sum(), self.B.square().sum()
        mean = self.scale**2 * (through_A + through_B)
        second = self.scale**2 * (
            square * size_A
            + 2 * through_A
            + self.sigma**2 * num_outputs * size_A
            + through_B * (num_inputs + 2)
            + self.sigma**2 * size_B * num_inputs
        )
        return float((second - mean) / mean)
