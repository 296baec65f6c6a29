"""How many parameters there are, and the report of what an injection did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_lora.errors import first_five
from lightning_lora.layers.base import AdapterSpec
from lightning_lora.layers.quantised import num_elements
from lightning_lora.layers.walk import lora_layers


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
