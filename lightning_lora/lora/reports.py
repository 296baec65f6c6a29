"""Reports: how many parameters there are, what an injection did, what rounding took in a merge."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_lora.errors import first_five
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.base import AdapterSpec, LoRALayer
from lightning_lora.lora.layers.quantised_weights import num_elements


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of a module, global under sharding.

    Args:
        trainable: Parameters that get gradients.
        total: All parameters, each counted once.
        adapter: Parameters of the adapters.
        by_role: Role of a layer (``attention``, ``mlp``, ...) to the adapter parameters of all layers with this role.
    """

    trainable: int
    total: int
    adapter: int
    by_role: dict[str, int]

    @property
    def share(self) -> float:
        """Trainable over total parameters, between 0 and 1."""
        return self.trainable / self.total if self.total else 0.0


def count_parameters(module: nn.Module) -> ParameterCount:
    """Count the parameters of ``module``.

    A shared parameter counts once. A sharded parameter counts in full, a quantised one as the weight it stands for.
    """
    by_role: dict[str, int] = {}
    for layer in lora_layers(module).values():
        if not layer.lora_follows:
            count = sum(factor.numel() for factor in layer.lora_factors().values())
            by_role[layer.lora_spec.role] = by_role.get(layer.lora_spec.role, 0) + count
    parameters = list(module.parameters())
    trainable = sum(num_elements(parameter) for parameter in parameters if parameter.requires_grad)
    return ParameterCount(
        trainable=trainable - sum(map(_num_kept, lora_layers(module).values())),
        total=sum(num_elements(parameter) for parameter in parameters),
        adapter=sum(by_role.values()),
        by_role=by_role,
    )


def _num_kept(layer: LoRALayer) -> int:
    """Numbers in the trainable factors of ``layer`` that stay as they start."""
    return sum(
        factor.numel() * spec.start // spec.rank
        for weight, spec in ({} if layer.lora_follows else layer.lora_specs).items()
        for factor in layer.lora_pair(weight)
        if factor.requires_grad
    )


@dataclass(frozen=True)
class InjectionReport:
    """What `inject_lora` did; ``print(report)`` shows it in a few lines.

    Args:
        layers: Name of every adapted layer to its rank, alpha and role.
        trainable: Names of the modules trained in full.
        skipped: Name of every layer with weights that was left alone to the reason.
        parameters: Numbers of parameters after the injection.
        adapter_bytes: Memory of the adapter, in bytes.
        notes: What else a run should know at its start, a sentence each.
    """

    layers: dict[str, AdapterSpec]
    trainable: tuple[str, ...]
    skipped: dict[str, str]
    parameters: ParameterCount
    adapter_bytes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        ranks = sorted({spec.rank - spec.start for spec in self.layers.values()})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        roles = _counted(spec.role for spec in self.layers.values())
        lines = [
            f"lora: {len(self.layers)} layers adapted ({', '.join(roles)}), rank {rank}",
            f"lora: {self.parameters.trainable:,} of {self.parameters.total:,} parameters train "
            f"({self.parameters.share:.2%}), adapter {self.adapter_bytes / 1e6:.2f} MB",
        ]
        if self.skipped:
            reasons = _counted(self.skipped.values())
            more = f"; {len(reasons) - 6} more reasons" if len(reasons) > 6 else ""
            lines.append(f"lora: left alone: {'; '.join(reasons[:6])}{more}")
        if self.trainable:
            lines.append(f"lora: trained in full: {first_five(self.trainable)}")
        return "\n".join(lines + [f"lora: {note}" for note in self.notes])


def _counted(words: Iterable[str]) -> list[str]:
    """Each different word with its count, ``["8 attention", "6 mlp"]``, in the order of first occurrence."""
    return [f"{count} {word}" for word, count in Counter(words).items()]


_LOSSY = 0.1
"""Share of an update lost to rounding above which the merged model is no longer the trained one."""


@dataclass(frozen=True)
class MergeReport:
    """What rounding took when adapters were merged, in memory or on disk.

    Args:
        losses: Merged layer, or merged tensor on disk, to ``|stored change - update| / |update|``, the share of its
            update that rounding took; in memory 0 for weights in float32 or wider.
        max_errors: Merged tensor on disk to the largest difference between the exact sum and what was stored, in weight
            units; empty for a merge in memory.
        base: Folder of the base checkpoint on disk; None for a merge in memory.
        adapter_sha256: SHA-256 of the adapter's tensors on disk; None for a merge in memory.
        dtype: Type that all weights on disk were converted to; None if each kept its own.
    """

    losses: Mapping[str, float]
    max_errors: Mapping[str, float] = field(default_factory=dict)
    base: str | None = None
    adapter_sha256: str | None = None
    dtype: str | None = None

    @property
    def worst(self) -> float:
        """The largest loss of any layer."""
        return max(self.losses.values())

    def __str__(self) -> str:
        worst = max(self.losses, key=lambda name: self.losses[name])
        changed = f"changed a weight by at most {max(self.max_errors.values()):.2e} and " if self.max_errors else ""
        loss = f"took at most {self.worst:.2%} of an update ({worst})"
        return f"{len(self.losses)} layers merged; rounding {changed}{loss}"

    def warn_if_lossy(self) -> None:
        """Warn if rounding took more than a tenth of any update."""
        if self.worst > _LOSSY:
            warnings.warn(
                f"{self}. The weights are too coarse for so small an update: keep the adapter separate, or merge into "
                f"float32 weights.",
                stacklevel=4,
            )
