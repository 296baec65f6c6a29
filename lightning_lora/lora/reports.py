"""Reports: how many parameters there are, what an injection did, what rounding took in a merge."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_lora.errors import first_five
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.base import AdapterSpec
from lightning_lora.lora.layers.quantised_weights import num_elements


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters, global under sharding.

    Args:
        trainable: Parameters that get gradients.
        total: All parameters, each counted once.
        adapter: Parameters of the adapters.
        by_role: Adapter parameters by the role of their layer.
    """

    trainable: int
    total: int
    adapter: int
    by_role: dict[str, int]

    @property
    def share(self) -> float:
        """Trainable over total."""
        return self.trainable / self.total if self.total else 0.0


@dataclass(frozen=True)
class InjectionReport:
    """What `inject_lora` did.

    Args:
        layers: Name to spec of every adapted layer.
        trainable: Names of the modules trained in full.
        skipped: Name to reason of every weight layer left alone.
        parameters: Counts after injection.
        adapter_bytes: Size of the adapter in memory, bytes.
    """

    layers: dict[str, AdapterSpec]
    trainable: tuple[str, ...]
    skipped: dict[str, str]
    parameters: ParameterCount
    adapter_bytes: int

    def __str__(self) -> str:
        ranks = sorted({spec.rank for spec in self.layers.values()})
        roles = [spec.role for spec in self.layers.values()]
        counts = ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
        reasons = list(self.skipped.values())
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [
            f"lora: {len(self.layers)} layers adapted ({counts}), rank {rank}",
            f"lora: {self.parameters.trainable:,} of {self.parameters.total:,} parameters train "
            f"({self.parameters.share:.2%}), adapter {self.adapter_bytes / 1e6:.2f} MB",
        ]
        if reasons:
            groups = [f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons)]
            more = f"; {len(groups) - 6} more reasons" if len(groups) > 6 else ""
            lines.append(f"lora: left alone: {'; '.join(groups[:6])}{more}")
        if self.trainable:
            lines.append(f"lora: trained in full: {first_five(self.trainable)}")
        return "\n".join(lines)


def count_parameters(module: nn.Module) -> ParameterCount:
    """Count parameters once each, shared ones too; sharded parameters count whole, packed ones what they hold."""
    layers = lora_layers(module)
    by_role: dict[str, int] = {}
    for layer in (layer for layer in layers.values() if not layer.lora_follows):
        count = sum(factor.numel() for factor in layer.lora_factors().values())
        by_role[layer.lora_spec.role] = by_role.get(layer.lora_spec.role, 0) + count
    parameters = list(module.parameters())
    return ParameterCount(
        trainable=sum(num_elements(parameter) for parameter in parameters if parameter.requires_grad),
        total=sum(num_elements(parameter) for parameter in parameters),
        adapter=sum(by_role.values()),
        by_role=by_role,
    )


# Above this share of an update lost the merged model is worth a second look.
WORTH_A_WARNING = 0.1


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
        """The largest loss."""
        return max(self.losses.values())

    def __str__(self) -> str:
        worst = max(self.losses, key=lambda name: self.losses[name])
        changed = f"changed a weight by at most {max(self.max_errors.values()):.2e} and " if self.max_errors else ""
        loss = f"took at most {self.worst:.2%} of an update ({worst})"
        return f"{len(self.losses)} layers merged; rounding {changed}{loss}"

    def warn_if_lossy(self) -> None:
        """Warn where rounding took more than a tenth of an update: the merged model is then not the trained one."""
        if self.worst > WORTH_A_WARNING:
            warnings.warn(
                f"{self}. The weights are too coarse for so small an update: keep the adapter apart, or merge into "
                f"float32 weights.",
                stacklevel=4,
            )
