"""Adapters cut to a lower rank for a while: what is lost without half of the rank, or without a group of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.lora.layers.adapted import learning_weights
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.dora import DoRALayer


def cut_factors(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of ``B A`` of a lower rank, as factors of the same shapes, padded with zeros.

    A factor that experts share becomes one for each expert.

    With ``B = Q_B R_B`` and ``A^T = Q_A R_A`` the singular values are those of ``R_B R_A^T``, an ``r x r`` matrix.

    Args:
        A: ``(*, r, in)``.
        B: ``(*, out, r)``.
        rank: The rank to keep, at least 0.
    """
    wide_A, wide_B = (factor.detach().to(torch.promote_types(factor.dtype, torch.float32)) for factor in (A, B))
    (Q_A, R_A), (Q_B, R_B) = torch.linalg.qr(wide_A.mT), torch.linalg.qr(wide_B)
    U, S, V = torch.linalg.svd(R_B @ R_A.mT)
    cut_A, cut_B = (factor.new_zeros(*U.shape[:-2], *factor.shape[-2:]) for factor in (A, B))
    cut_B[..., :, :rank] = (Q_B @ U[..., :, :rank] * S[..., None, :rank]).to(B.dtype)
    cut_A[..., :rank, :] = (V[..., :rank, :] @ Q_A.mT).to(A.dtype)
    return cut_A, cut_B


@contextmanager
def cut_adapters(module: nn.Module, ranks: Mapping[str, int]) -> Iterator[None]:
    """Within the context, adapted weights have the best updates of lower ranks; factors return bit for bit on exit.

    A magnitude stays at a rank above zero. At rank zero it is that of the base weight, so that the layer computes what
    its base computes. Adapters of frozen copies of the network stay as they are.

    Args:
        ranks: Name of an adapted weight, as in `learning_weights`, to the rank that is kept.
    """
    chosen = {name: each for name, each in learning_weights(module).items() if name in ranks}
    before = [(factor, factor.data) for layer, _ in chosen.values() for factor in layer.lora_factors().values()]
    try:
        for name, (layer, weight) in chosen.items():
            _cut(layer, weight, ranks[name])
        yield
    finally:
        for factor, data in before:
            factor.data = data


@torch.no_grad()
def _cut(layer: LoRALayer, weight: str, rank: int) -> None:
    A, B = layer.lora_pair(weight)
    A.data, B.data = cut_factors(A.data, B.data, rank)
    if rank == 0 and isinstance(layer, DoRALayer):
        layer.lora_magnitude.data = layer.lora_norms().to(layer.lora_magnitude.dtype)
