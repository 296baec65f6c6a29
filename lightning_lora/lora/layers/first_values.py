"""The values that fresh factors get: random ones (`draw_factors`), or parts of the weight (PiSSA) or of its gradient.

A start ``B0 A0`` of the last two kinds is not zero. So that a fresh layer still computes what its base computes, and
the base stays as it is, the factors hold it twice: ``A = [A0; A0]`` and ``B = [B0, -B0]``, of twice the rank. The
second half stays as it starts: the update is ``scale * (B A - B0 A0)``, in the form of a plain LoRA.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KEPT_STARTS = ("pissa", "gradient")
"""Names of the first values that a second half of the factors takes off again and keeps."""
_GAMMA = 16.0
NO_WEIGHTS = (
    "init={!r} starts from the values of the weights, and this strategy makes the adapters before it has them: load "
    "the weights before the strategy shards the module, or use another init."
)


def draw_factors(A: Tensor, B: Tensor, init: str, start: int = 0) -> None:
    """Set ``A`` to random values and ``B`` to zero, or both to random values with ``B A = 0`` for ``"orthogonal"``.

    Components that are to keep a start get that of the ones before them. As many random numbers are drawn as for a
    plain LoRA of the components that train.
    """
    if init == "orthogonal":
        _draw_orthogonal(A, B)
        return
    bound = 1 / math.sqrt(A.shape[-1])  # kaiming-uniform with a = sqrt(5), as in nn.Linear and PEFT
    for trained in (A[..., :start, :], A[..., 2 * start :, :]):
        if init == "gaussian":
            trained.normal_(std=1 / A.shape[-2])
        else:
            trained.uniform_(-bound, bound)
    A[..., start : 2 * start, :] = A[..., :start, :]
    B.zero_()


def _draw_orthogonal(A: Tensor, B: Tensor) -> None:
    """``A = Q1^T X / 10`` and ``B = Y Q2 / 10`` with normal ``X``, ``Y``, and the rows of a random rotation in Q1, Q2.

    References:
        PEFT's ``init_lora_weights="orthogonal"``; https://datta0.github.io/posts/rethink-lora-init/
    """
    rank = A.shape[-2]
    # QR knows no narrow types.
    wide = {"device": A.device, "dtype": torch.promote_types(A.dtype, torch.float32)}
    rotation, _ = torch.linalg.qr(torch.randn(rank, rank, **wide))
    # Adapters that have grown may have odd ranks.
    X = torch.randn(*A.shape[:-2], rank - rank // 2, A.shape[-1], **wide)
    Y = torch.randn(*B.shape[:-1], rank // 2, **wide)
    A.copy_(rotation[0::2].mT @ X / 10)
    B.copy_(Y @ rotation[1::2] / 10)


def set_principal_factors(A: Tensor, B: Tensor, weight: Tensor, scale: float, start: int) -> None:
    """Set the first ``2 * start`` components to the principal part of ``weight`` and to its negative.

    ``A0 = sqrt(S / scale) V^T`` and ``B0 = U sqrt(S / scale)`` from the ``start`` largest singular values.

    Args:
        A: ``(*, rank, in)``.
        B: ``(*, out, rank)``.
        weight: ``(*, out, in)``.
        scale: Factor of ``B A``.
        start: Number of singular values.

    References:
        Meng et al., *PiSSA*, NeurIPS 2024, section 3, https://arxiv.org/abs/2404.02948
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    U, S, Vh = torch.linalg.svd(weight.detach().to(wide), full_matrices=False)
    roots = (S[..., :start] / scale).sqrt()
    A0, B0 = roots.unsqueeze(-1) * Vh[..., :start, :], U[..., :start] * roots.unsqueeze(-2)
    _set_twice(A, B, A0, B0)


def set_gradient_factors(A: Tensor, B: Tensor, U: Tensor, Vh: Tensor, start: int) -> None:
    r"""Set the first ``2 * start`` components to singular vectors of the gradient of the weight, and the negative.

    ``A0 = c V^T`` of the first ``start`` vectors and ``B0 = c U`` of the next ``start``, or of the last where there are
    fewer. ``c^2 = sqrt(out) / 16``: outputs of the update then do not grow with its width. Components for which there
    is no vector keep the row of ``A`` that was drawn for them, and have ``B = 0``.

    Args:
        A: ``(rank, in)``.
        B: ``(out, rank)``.
        U: ``(out, k)`` left singular vectors, of the largest values first.
        Vh: ``(k, in)`` right ones.
        start: Number of components.

    References:
        Wang et al., *LoRA-GA*, NeurIPS 2024, theorems 3.1 and 3.2, https://arxiv.org/abs/2407.05000; gamma as in PEFT
    """
    c, used, last = (len(U) ** 0.5 / _GAMMA) ** 0.5, min(start, len(Vh)), min(2 * start, len(Vh))
    A0, B0 = A[:start].clone(), torch.zeros_like(B[:, :start])
    A0[:used], B0[:, :used] = c * Vh[:used], c * U[:, last - used : last]
    _set_twice(A, B, A0, B0)


def _set_twice(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> None:
    A[..., : 2 * A0.shape[-2], :] = torch.cat([A0, A0], dim=-2).to(A)
    B[..., : 2 * B0.shape[-1]] = torch.cat([B0, -B0], dim=-1).to(B)


def without_gradients(A: Tensor, B: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The factors, with the components ``start`` to ``2 * start``, which stay as they start, cut off from gradients."""
    return _without_gradient(A, start, -2), _without_gradient(B, start, -1)


def _without_gradient(factor: Tensor, start: int, dim: int) -> Tensor:
    trained, kept, grown = factor.tensor_split((start, 2 * start), dim)
    return torch.cat([trained, kept.detach(), grown], dim)


@torch.no_grad()
def has_update(A: Tensor, B: Tensor, init: str) -> bool:
    """Whether ``B A`` differs from zero, where B starts random by more than the rounding of the product."""
    # Shards of FSDP1 have no shape.
    if init not in ("orthogonal", *KEPT_STARTS) or min(A.ndim, B.ndim) < 2:
        return bool(B.any())
    wide = torch.promote_types(A.dtype, torch.float32)
    update = (B.to(wide) @ A.to(wide)).norm()
    return bool(update > 8 * torch.finfo(A.dtype).eps * (A.norm() * B.norm()).to(wide))
