"""Adapted embedding tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.lora.functional import embedding_update
from lightning_lora.lora.layers.base import LoRALayer


class LoRAEmbedding(LoRALayer, nn.Embedding):
    r"""A frozen embedding table plus a trainable low-rank update: ``row(i) = W_i + scale * (B A)_i``.

    ``A`` starts at zero and ``B`` random, the opposite of `LoRALinear`: a row that training never looks up must stay
    exactly as in the base, which a random ``A`` and a trained ``B`` shared by all rows would change (Hu et al.'s code
    and PEFT do the same). Dropout does not apply to indices.

    Shape:
        - ``W``: ``(vocab, dim)``, ``A``: ``(rank, vocab)``, ``B``: ``(dim, rank)``.
        - Input: integer indices ``(*)``, output ``(*, dim)``.
    """

    zero_factor = "lora_A"

    @staticmethod
    @override
    def dimensions(module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    @override
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if not self.lora_active:
            return y
        update = embedding_update(input, self.lora_A, self.lora_B, self.lora_spec.scale, self.padding_idx)
        # Gemma's tables multiply the rows they look up; the update must be multiplied too, or merging would differ.
        return y + update.to(y.dtype) * getattr(self, "embed_scale", 1.0)

    @override
    def weight_delta(self, weight: str = "weight") -> Tensor:
        return super().weight_delta(weight).T

    @override
    @torch.no_grad()
    def reset_factors(self) -> None:
        self.lora_A.zero_()
        self.lora_B.normal_()

    @property
    @override
    def lora_moved(self) -> bool:
        return bool(self.lora_A.detach().any())
