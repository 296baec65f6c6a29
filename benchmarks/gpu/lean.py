"""A leaner formulation of our linear group, to see what a GPU would gain from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Lean(torch.autograd.Function):
    """What ours could be on a GPU: casts and concatenation done once before, the scale in BLAS's alpha, no copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: float, A: Tensor, Bs: list[Tensor], Ws: list[Tensor], *factors: Tensor) -> Any:
        rows = x.view(-1, x.shape[-1])
        inner, outputs, at = rows @ A.T, [], 0
        for W, B in zip(Ws, Bs, strict=True):
            y = rows.new_empty(len(rows), W.shape[0])
            torch.addmm(y, inner[:, at : at + B.shape[1]], B.T, beta=0, alpha=s, out=y)
            torch.addmm(y, rows, W.T, out=y)
            outputs.append(y.view(*x.shape[:-1], -1))
            at += B.shape[1]
        ctx.save_for_backward(rows, inner, A, *Bs, *Ws)
        ctx.s, ctx.n, ctx.shape = s, len(Ws), x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, inner, A, *rest = ctx.saved_tensors
        Bs, Ws, s = rest[: ctx.n], rest[ctx.n :], ctx.s
        ds = [d.reshape(-1, d.shape[-1]) for d in grad_outputs]
        d_inner, at, d_Bs = torch.empty_like(inner), 0, []
        wide: dict[str, Any] = {} if x.dtype is torch.float32 or not x.is_cuda else {"out_dtype": torch.float32}
        for d, B in zip(ds, Bs, strict=True):
            part = slice(at, at + B.shape[1])
            d_inner[:, part] = d @ B
            d_Bs.append(torch.mm(d.T, inner[:, part], **wide) * s)
            at += B.shape[1]
        d_A = torch.mm(d_inner.T, x, **wide) * s
        d_x = torch.empty_like(x)
        torch.addmm(d_x, d_inner, A, beta=0, alpha=s, out=d_x)
        for d, W in zip(ds, Ws, strict=True):
            torch.addmm(d_x, d, W, out=d_x)
        return d_x.view(ctx.shape), None, None, None, None, *d_A.split([B.shape[1] for B in Bs]), *d_Bs
