"""Adapters cut to a lower rank for a while: what is lost without half of the rank, or without a group of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.lora.layers.adapted import adapted_weights


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Singular values of ``B A``, descending, ``(*, r)``; the product is never formed."""
    return torch.linalg.svdvals(_core(A, B)[1])


def cut_factors(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of ``B A`` of a lower rank, as factors of the same shapes, padded with zeros.

    With ``B = Q_B R_B`` and ``A^T = Q_A R_A`` the singular values are those of ``R_B R_A^T``, an ``r x r`` matrix.

    Args:
        A: ``(*, r, in)``.
        B: ``(*, out, r)``.
        rank: The rank to keep, at least 0.
    """
    Q_B, core, Q_A = _core(A, B)
    U, S, V = torch.linalg.svd(core)
    cut_A, cut_B = torch.zeros_like(A), torch.zeros_like(B)
    cut_B[..., :, :rank] = (Q_B @ U[..., :, :rank] * S[..., None, :rank]).to(B.dtype)
    cut_A[..., :rank, :] = (V[..., :rank, :] @ Q_A.mT).to(A.dtype)
    return cut_A, cut_B


def _core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    A, B = (factor.detach().float() if factor.element_size() < 4 else factor.detach() for factor in (A, B))
    (Q_A, R_A), (Q_B, R_B) = torch.linalg.qr(A.mT), torch.linalg.qr(B)
    return Q_B, R_B @ R_A.mT, Q_A


@contextmanager
def cut_adapters(module: nn.Module, ranks: Mapping[str, int]) -> Iterator[None]:
    """Within the context, adapted weights have the best updates of lower ranks; factors return bit for bit on exit.

    Args:
        module: The adapted module.
        ranks: Name of an adapted weight, as in `adapted_weights`, to the rank that is kept.
    """
    weights = adapted_weights(module)
    pairs = {name: layer.lora_pair(weight) for name, (layer, weight) in weights.items() if name in ranks}
    before = [(factor, factor.data) for pair in pairs.values() for factor in pair]
    try:
        for name, pair in pairs.items():
            for factor, cut in zip(pair, cut_factors(*(factor.data for factor in pair), ranks[name]), strict=True):
                factor.data = cut
        yield
    finally:
        for factor, data in before:
            factor.data = data
