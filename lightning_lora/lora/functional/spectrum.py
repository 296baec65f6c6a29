"""The spectrum of an update ``scale * B A``, from its factors alone."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Singular values of ``scale * B A``, descending, ``(*, rank)``, in float64.

    ``B A`` is never formed: with ``B = Q_B R_B`` and ``A^T = Q_A R_A`` it has the singular values of ``R_B R_A^T``.

    Args:
        A: ``(*, rank, in)``, where ``*`` may be experts.
        B: ``(*, out, rank)``.
        scale: alpha / rank, dimensionless.
    """
    _, R_B = torch.linalg.qr(B.double(), mode="r")
    _, R_A = torch.linalg.qr(A.double().mT, mode="r")
    return torch.linalg.svdvals(R_B @ R_A.mT) * scale


def effective_rank(values: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values, between 1 and their number; 0 for no update.

    References:
        Roy and Vetterli, *The effective rank*, EUSIPCO 2007.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    share = values[values > 0] / total
    return float(torch.exp(-(share * share.log()).sum()))
