"""One update for a weight that several layers share: the other layers use the factors of the first."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.lora.layers.base import LoRALayer, swap_class
from lightning_lora.lora.layers.embedding import LoRAEmbedding
from lightning_lora.lora.layers.linear import LoRALinear
from lightning_lora.lora.layers.quantised_linear import LoRAQuantisedLinear


class LoRATiedHead(LoRALinear):
    r"""An output layer that shares weight *and* update with an embedding: ``y = W x + b + scale * (B A)^T x``.

    Shape:
        - ``W``: ``(vocab, dim)``; ``A``: ``(rank, vocab)`` and ``B``: ``(dim, rank)`` are those of the embedding.
        - Input ``(*, dim)``, output ``(*, vocab)``.
    """

    @override
    def linear_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B.T, self.lora_A.T


def share_factors(module: nn.Module, source: LoRALayer) -> LoRALayer:
    """Adapt ``module`` with the factors of ``source``, an adapted layer with the same weight."""
    is_head = isinstance(source, LoRAEmbedding) and isinstance(module, nn.Linear)
    same = next(kind for kind in (LoRAEmbedding, LoRAQuantisedLinear, LoRALinear) if isinstance(source, kind))
    layer = swap_class(module, LoRATiedHead if is_head else same, source.lora_specs)
    layer.lora_follows = True
    for name, factor in source.lora_factors().items():
        layer.register_parameter(name, factor)
    return layer


def own_factors(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of a layer that shares factors, in the layout of its own kind, for software that shares none."""
    A, B = layer.linear_factors() if isinstance(layer, LoRATiedHead) else layer.lora_pair()
    return A.detach(), B.detach()
