r"""Ranks of single layers from the gradient of the frozen weights, at as many parameters as one rank for all.

The gradient ``G`` of a weight, summed over some batches, has singular values ``s_i``. A step along its best rank-``r``
part is first-order optimal at that rank (Eckart and Young), and ``(s_1^2 + ... + s_r^2) / |G|^2`` is the share of ``G``
that it holds. Ranks are given out one by one, each to the layer where the next share per parameter is largest.

References:
    Wang et al., *LoRA-GA*, 2024, https://arxiv.org/abs/2407.05000: adapters start from singular vectors of the first
    gradient; here only its singular values are used.
    Paischer et al., *EVA*, 2024, https://arxiv.org/abs/2410.07170: components of all layers compete for a rank by the
    share of variance they explain, and the scale is kept; there of activations, and per rank instead of per parameter.

That the two ideas together train better than one rank for all is not shown anywhere; ``docs/use/rank_growth.md`` has a
measurement.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import RankChangeError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.evaluation_mode import in_eval_mode
from lightning_lora.lora.functional.sketched_svd import SketchedSVD
from lightning_lora.lora.targets.resolve import Target, resolve_targets


@dataclass(frozen=True)
class Allocation:
    """Ranks and alphas by layer, for ``LoRAConfig(rank_pattern=..., alpha_pattern=...)``.

    Args:
        rank_pattern: Full name of each layer to its rank.
        alpha_pattern: Full name of each layer to the alpha that keeps the scale of the uniform config.
        shares: Full name of each layer to the share of its gradient that its rank holds.
        parameters: Adapter parameters with these ranks, at most those of the uniform config.
        left_out: Name of each layer that keeps the uniform rank, to the reason.
    """

    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    shares: dict[str, float]
    parameters: int
    left_out: dict[str, str]


def allocate_ranks(
    module: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any], config: LoRAConfig
) -> Allocation:
    """Choose the rank of each layer that ``config`` adapts, at no more parameters than ``config`` has.

    Each layer gets between 1 and twice the rank of ``config``, at most what its weight can hold. Nothing of ``module``
    is changed; it computes in eval mode meanwhile. One gradient of a weight is held at a time, and two thin sketches
    per layer.

    Example::

        found = allocate_ranks(model, lambda batch: model(**batch).loss, batches, LoRAConfig(rank=16))
        config = LoRAConfig(rank=16, rank_pattern=found.rank_pattern, alpha_pattern=found.alpha_pattern)

    Args:
        module: The module without adapters, with weights in memory.
        loss: Loss of a batch, a scalar that depends on the weights.
        batches: Batches on the device of the module; a few are enough, and all are used.
        config: What to adapt, and the rank that sets the budget.

    Raises:
        ConfigError: If no layer can be measured, there is no batch, or a loss or gradient is not finite.
        TargetNotFoundError: If a name pattern matches nothing.
    """
    targets = resolve_targets(module, config).layers
    left_out = {target.name: reason for target in targets if (reason := _not_measured(target))}
    measured = {target.name: target for target in targets if target.name not in left_out}
    if not measured:
        raise RankChangeError(f"no rank can be allocated: {'; '.join(sorted(set(left_out.values())))}.")
    highest = {name: _highest(target) for name, target in measured.items()}
    sketches = {
        name: _Gradient(target, highest[name], number) for number, (name, target) in enumerate(measured.items())
    }
    if not _measure(module, loss, batches, list(sketches.values())):
        raise RankChangeError("no rank can be allocated: batches is empty.")
    shares = {name: sketch.shares()[: highest[name]] for name, sketch in sketches.items()}
    cost = {name: _cost(target) for name, target in measured.items()}
    ranks = _give_out(shares, cost, sum(cost[name] * target.spec.rank for name, target in measured.items()))
    kept = [target for target in targets if target.name in left_out]
    fixed = sum(_cost(target, weight) * spec.rank for target in kept for weight, spec in target.specs.items())
    scales = {name: target.spec.scale for name, target in measured.items()}
    return Allocation(
        rank_pattern=ranks,
        alpha_pattern={name: scales[name] / config.scale(rank, 1.0) for name, rank in ranks.items()},
        shares={name: float(sum(shares[name][:rank])) for name, rank in ranks.items()},
        parameters=fixed + sum(cost[name] * rank for name, rank in ranks.items()),
        left_out=left_out,
    )


def _not_measured(target: Target) -> str:
    """Why the gradient of a layer is not a matrix that can be measured; empty if it is one."""
    if len(target.specs) > 1:
        return "layers with several weights, such as fused experts, share a rank"
    (name,) = target.specs
    weight, shape = getattr(target.module, name), target.kind.weights(target.module)[name]
    if shape.num_experts:
        return "experts of a mixture share a rank"
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return "quantised weights have no gradient"
    if weight.is_meta:
        return "weights without values have no gradient"
    if weight.numel() != shape.num_in * shape.num_out:
        return "weights that are no matrix, such as grouped convolutions, are not measured"
    return ""


def _highest(target: Target) -> int:
    (name,) = target.specs
    shape = target.kind.weights(target.module)[name]
    return min(2 * target.spec.rank, shape.num_in, shape.num_out)


def _cost(target: Target, weight: str | None = None) -> int:
    """Parameters of one rank of a layer."""
    weight = weight or next(iter(target.specs))
    spec = target.specs[weight]
    A, B = target.kind.factor_shapes(target.module, weight, spec)[:2]  # a magnitude has no rank
    return (math.prod(A) + math.prod(B)) // spec.rank


class _Gradient:
    """The gradient of a weight, summed over batches."""

    def __init__(self, target: Target, rank: int, seed: int) -> None:
        (name,) = target.specs
        self.weight: nn.Parameter = getattr(target.module, name)
        rows, columns = self.weight.shape[0], self.weight.numel() // self.weight.shape[0]
        self.sketch = SketchedSVD(rows, columns, rank, seed, self.weight.device, torch.float32)

    def add(self, weight: Tensor) -> None:
        """Take the gradient of the weight, and free it."""
        assert weight.grad is not None
        self.sketch.add_matrix(weight.grad.flatten(1))
        weight.grad = None

    def shares(self) -> list[float]:
        """Shares of the squared norm that each singular direction holds, descending; zeros without a gradient."""
        if not self.sketch.is_finite():
            raise RankChangeError("no rank can be allocated: a gradient is NaN or infinite.")
        squares, total = self.sketch.squares()
        return (squares / total).tolist() if total > 0 else [0.0] * len(squares)


def _measure(
    module: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any], sketches: list[_Gradient]
) -> int:
    """Add the gradients of all batches to the sketches; returns the number of batches."""
    count = 0
    with _only_trained(module, [sketch.weight for sketch in sketches]), torch.enable_grad():
        handles = [s.weight.register_post_accumulate_grad_hook(s.add) for s in sketches]
        try:
            for batch in batches:
                value = loss(batch)
                if not torch.isfinite(value):
                    raise RankChangeError(f"no rank can be allocated: the loss of batch {count} is {value.item()}.")
                value.backward()
                count += 1
        finally:
            for handle in handles:
                handle.remove()
    return count


@contextmanager
def _only_trained(module: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Let only ``weights`` have gradients, in eval mode; restore flags, gradients and random numbers on exit."""
    before = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)), in_eval_mode(module):
            module.requires_grad_(False)
            for weight in weights:
                weight.grad = None
                weight.requires_grad_(True)
            yield
    finally:
        for parameter, trained, gradient in before:
            parameter.requires_grad_(trained)
            parameter.grad = gradient


def _give_out(shares: dict[str, list[float]], cost: dict[str, int], budget: int) -> dict[str, int]:
    """Rank of each layer: 1, and then one more where the next share per parameter is largest, within the budget."""
    ranks = dict.fromkeys(shares, 1)
    left = budget - sum(cost.values())
    queue = [(-shares[name][1] / cost[name], name) for name in shares if len(shares[name]) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if cost[name] > left:
            continue
        left -= cost[name]
        ranks[name] += 1
        if ranks[name] < len(shares[name]):
            heapq.heappush(queue, (-shares[name][ranks[name]] / cost[name], name))
    return ranks
