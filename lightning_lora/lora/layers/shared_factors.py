"""One update for a weight that several layers share: the factors of one layer, used by the others too."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.lora.layers.base import LoRALayer, adapt
from lightning_lora.lora.layers.embedding import LoRAEmbedding
from lightning_lora.lora.layers.linear import LoRALinear
from lightning_lora.lora.layers.quantised_linear import LoRAQuantisedLinear


class LoRATiedHead(LoRALinear):
    r"""An output layer that shares weight *and* update with an embedding: ``y = W x + b + scale * (B A)^T x``.

    Shape:
        - ``W``: ``(vocab, dim)``; ``A``: ``(rank, vocab)`` and ``B``: ``(dim, rank)`` are the embedding's own.
        - Input ``(*, dim)``, output ``(*, vocab)``.
    """

    @override
    def linear_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B.T, self.lora_A.T


def attach_tied(module: nn.Module, source: LoRALayer) -> LoRALayer:
    """Let ``module`` share the factors of ``source``, whose weight it has."""
    crossed = isinstance(source, LoRAEmbedding) and isinstance(module, nn.Linear)
    alike = next(kind for kind in (LoRAEmbedding, LoRAQuantisedLinear, LoRALinear) if isinstance(source, kind))
    kind = LoRATiedHead if crossed else alike
    layer = adapt(module, kind, source.lora_specs)
    layer.lora_follows = True
    for name, factor in source.lora_factors().items():
        layer.register_parameter(name, factor)
    return layer


def tied_tensors(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """The factors of a following layer as if they were its own, for software that does not share them."""
    A, B = layer.linear_factors() if isinstance(layer, LoRATiedHead) else layer.lora_pair()
    return A.detach(), B.detach()
