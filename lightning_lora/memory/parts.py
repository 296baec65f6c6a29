"""What the bytes of a training step are for."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on one device at the peak of a training step, by what they are for.

    Args:
        weights: Weights and buffers of the base, and modules trained in full.
        adapters: The factors ``A`` and ``B``.
        gradients: Gradients of everything that is trained.
        optimizer: State of the optimizer.
        activations: What autograd keeps for the backward pass, and temporaries at the peak.
        logits: Outputs over the vocabulary or the classes, and their gradients, at the peak.
        overhead: What the allocator, the device's context and the sharding add; measured constants, documented where
            they are defined.
    """

    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """The parts and their ``total``."""
        return asdict(self) | {"total": self.total}
