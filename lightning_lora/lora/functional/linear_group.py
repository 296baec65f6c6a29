"""A group of adapted linear layers with one input: its tensors, in the order autograd sees them, and its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_lora.lora.functional.seeded_dropout import Seed


class AdaptedWeight(NamedTuple):
    """A frozen linear layer and its update: ``x W^T + b + scale * x A^T B^T``.

    Args:
        weight: ``(out, in)``; of fused experts ``(experts, out, in)``.
        bias: ``(out,)`` or None; of fused experts ``(experts, out)``.
        A: ``(r, in)``; of fused experts ``(experts, r, in)``, or ``(1, r, in)`` shared by all experts.
        B: ``(out, r)``; of fused experts ``(experts, out, r)``, or ``(1, out, r)``.
        scale: alpha / r, dimensionless.
        layer: The layer that holds the weight, by which dropout tells callers apart (`shared_seed`); None for a mask
            of its own in each call.
        keeps_gate: Whether an input that a gate computed is kept, instead of computed again (`gated_input`).
    """

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    layer: object = None
    keeps_gate: bool = False


class Settings(NamedTuple):
    """What the computation of a group depends on besides its tensors.

    Args:
        scales: Factor of each layer's update, dimensionless; with dropout divided by the probability of keeping.
        dropout: Probability of zeroing an entry of the input of the updates.
        seed: Decides which entries are zeroed.
        activation: How the input was computed from its sources, as in `GatedInput`; None: the input is its own source.
        merges: Whether each ``W + scale B A`` is formed, instead of adding the small product to the large one.
    """

    scales: tuple[float, ...]
    dropout: float = 0.0
    seed: Seed = 0
    activation: str | None = None
    merges: bool = False


class GroupTensors(NamedTuple):
    """The tensors of a group, or one item for each of them: its gradient, or whether it needs one.

    Args:
        biases: Bias of each layer, ``(out,)`` or None.
        weights: Weight of each layer, ``(out, in)``.
        As: ``A`` of each layer, ``(r, in)``.
        Bs: ``B`` of each layer, ``(out, r)``.
        sources: The input ``(*, in)``, or the tensors it was computed from.
    """

    biases: Sequence[Any]
    weights: Sequence[Any]
    As: Sequence[Any]
    Bs: Sequence[Any]
    sources: Sequence[Any]

    @staticmethod
    def of(flat: Sequence[Any], settings: Settings) -> GroupTensors:
        """Split the flat sequence that `flat` makes."""
        n = len(settings.scales)
        return GroupTensors(flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], flat[3 * n : 4 * n], flat[4 * n :])

    def flat(self) -> list[Any]:
        """All items in one list."""
        return [item for items in self for item in items]
