"""Gradients on this device against the written-out formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.place import Place, error
from benchmarks.gpu.whole_models import check_whole_model
from lightning_lora.lora.functional import AdaptedWeight, fused_lora_linears
from lightning_lora.lora.functional.expert_rows import GroupedRows, LoopedRows
from lightning_lora.lora.functional.experts import expert_linear, expert_update
from lightning_lora.lora.functional.fused_experts import fused_expert_linear
from lightning_lora.lora.functional.seeded_dropout import drop
from lightning_lora.tasks.head_loss import head_loss

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
WHOLE_MODEL_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


def correctness(place: Place) -> dict[str, Any]:
    """Gradients of everything fused against the written-out formula in float64, on this device."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype in LIMITS:
        check = Check(place, dtype)
        for dropout in (0.0, 0.25):
            check.linear_group(dropout)
        check.experts()
        check.head_loss()
    for dtype, limit in WHOLE_MODEL_LIMITS.items():
        check_whole_model(place, dtype, limit)
    place.found["all ok"] = all(row["ok"] for row in place.found.values() if isinstance(row, dict))
    return place.found


@dataclass
class Check:
    """Comparisons in one type, written into the notes of ``place``."""

    place: Place
    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    @property
    def kind(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.place.device)

    def compare(
        self, name: str, compute: Callable[..., Any], formula: Callable[..., Any], leaves: list[Tensor]
    ) -> None:
        """Outputs and gradients of ``compute`` in this type against those of ``formula`` in float64."""
        low = [leaf.to(self.dtype).requires_grad_() for leaf in leaves]
        high = [leaf.detach().double().requires_grad_() for leaf in low]
        made, right = (out if isinstance(out, tuple) else (out,) for out in (compute(*low), formula(*high)))
        d_outputs = [torch.randn_like(y) for y in made]
        got = [*made, *torch.autograd.grad(made, low, d_outputs)]
        want = [*right, *torch.autograd.grad(right, high, [d.double() for d in d_outputs])]
        worst, limit = max(error(g.detach(), w.detach()) for g, w in zip(got, want, strict=True)), LIMITS[self.dtype]
        self.place.found[f"{name}, {self.kind}"] = {"worst": worst, "allowed": limit, "ok": bool(worst <= limit)}

    def linear_group(self, dropout: float) -> None:
        pick = self.place.pick
        tokens, d, outs, rank = pick(777, 33), pick(1024, 64), pick((1024, 256, 2816), (64, 32)), 16
        Ws = [(self.random(o, d) / d**0.5).to(self.dtype) for o in outs]
        biases = [self.random(o).to(self.dtype) if i == 0 else None for i, o in enumerate(outs)]
        A, B = [self.random(rank, d) / d**0.5 for _ in outs], [self.random(o, rank) * 0.1 for o in outs]
        seeds: list[int] = []

        def weights(factors: tuple[Tensor, ...]) -> zip[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
            return zip(Ws, biases, factors[: len(outs)], factors[len(outs) :], strict=True)

        def fused(x: Tensor, *factors: Tensor) -> Any:
            y: Any = fused_lora_linears(x, [AdaptedWeight(W, b, A, B, 2.0) for W, b, A, B in weights(factors)], dropout)
            seeds.append(y[0].grad_fn.settings.seed)
            return y

        def formula(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
            ones = torch.ones(x.shape, dtype=self.dtype, device=x.device)
            kept = x * drop(ones, dropout, seeds[-1]).double() if dropout else x
            scale = 2.0 / (1 - round(256 * dropout) / 256)
            return tuple(
                x @ W.double().T + (0 if b is None else b.double()) + scale * kept @ A.T @ B.T
                for W, b, A, B in weights(factors)
            )

        self.compare(f"group of {len(outs)}, dropout {dropout}", fused, formula, [self.random(3, tokens, d), *A, *B])

    def experts(self) -> None:
        """Experts, some of which see no row."""
        counts, hidden, inner = [0, 5, 130, 1, 64, 0, 7, 93], self.place.pick(512, 64), self.place.pick(768, 32)
        W = (self.random(len(counts), inner, hidden) / hidden**0.5).to(self.dtype)
        leaves = [
            self.random(sum(counts), hidden),
            self.random(len(counts), 8, hidden) / hidden**0.5,
            self.random(len(counts), inner, 8) * 0.1,
        ]
        ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(self.place.device)
        for way, rows in {"looped": LoopedRows(counts), "grouped": GroupedRows(ends)}.items():
            self.compare(
                f"experts {way}",
                lambda x, A, B, rows=rows: fused_expert_linear(x, AdaptedWeight(W, None, A, B, 2.0), rows),
                lambda x, A, B: expert_linear(x, W.double(), counts) + expert_update(x, A, B, 2.0, counts),
                leaves,
            )

    def head_loss(self) -> None:
        tokens, d, vocab = self.place.pick(777, 33), self.place.pick(1024, 64), self.place.pick(5003, 97)
        weight = (self.random(vocab, d) / d**0.5).to(self.dtype)
        labels = torch.randint(vocab, (3, tokens), generator=self.generator).to(self.place.device)
        labels[:, ::3] = -100

        def formula(hidden: Tensor) -> Tensor:
            scores = (hidden @ weight.double().T).flatten(0, 1)
            return F.cross_entropy(scores, labels.flatten(), ignore_index=-100, reduction="sum") / 7

        self.compare(
            "head loss",
            lambda hidden: head_loss(hidden, weight, labels, divisor=torch.tensor(7, device=self.place.device)),
            formula,
            [self.random(3, tokens, d)],
        )
