"""Whether adapters have room for what the data hold, at every rank: two ratios, as if all had to be memorised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_lora.errors import ConfigError, TargetNotFoundError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.planning.adapter_sizes import AdapterSizes, adapter_sizes, with_targets
from lightning_lora.planning.base_bits import BaseBits
from lightning_lora.planning.data_counts import DataCounts

RANKS = tuple(2**power for power in range(10))
"""The ranks of a table, 1 to 512."""
BITS_PER_PARAMETER = 2.0
"""What a parameter stores after about 1000 exposures (Allen-Zhu and Li, arXiv 2404.05405)."""
# Inside: half of what can be stored at most. In our oracle (benchmarks/capacity.py), exact storage ends at 2 bits for
# each parameter, so that a plan for all of them would stand on the edge.
_INSIDE = 1.0, 0.5
_TIGHT = 2.0, 1.0


@dataclass(frozen=True)
class CapacityRow:
    """The data against the adapters of one rank.

    Args:
        rank: The rank.
        targets: The target set, or the patterns of `LoRAConfig.targets` joined by commas.
        parameters: Trained parameters: adapters, and modules trained in full beside them.
        ratio_a: Unique supervised tokens (or labels) for each trained parameter; None if unknown.
        ratio_b: Bits of the unique targets over 2 bits for each trained parameter; None if unknown. The bits are those
            of the base model where they were measured, else those of `DataCounts`.
        verdict: ``"inside"`` (A at most 1 and B at most 0.5), ``"tight"`` (A at most 2 and B at most 1), ``"over"``, or
            ``"cannot tell"``.
    """

    rank: int
    targets: str
    parameters: int
    ratio_a: float | None
    ratio_b: float | None
    verdict: str


def capacity_table(
    module: nn.Module,
    counts: DataCounts,
    base_bits: BaseBits | None = None,
    config: LoRAConfig | None = None,
) -> list[CapacityRow]:
    """The rows of ranks 1 to 512 and of ``config.rank``, for the targets of ``config`` first and then for all others.

    The others are the sets ``"all"``, ``"attention"``, ``"mlp"`` and ``"experts"`` that the module has. They keep all
    settings of ``config`` but ``rank_pattern``. Both ratios take it that every target must be memorised, so they are
    above the need of data whose rules can be learned. Tokens count 1 bit each unless the bits of the base were
    measured: an assumption, about right for large pretrained models, and far too low for weak ones.

    Args:
        module: A module without adapters, on whatever device, the meta device included (see `adapter_sizes`).
        counts: What the data hold.
        base_bits: The bits of the data for the base model, if they were measured.
        config: The LoRA settings; None for the default ones.

    Raises:
        TargetNotFoundError: If ``config`` selects nothing.
        ConfigError: If the module is adapted already, or cannot be adapted with these settings.
    """
    config = LoRAConfig() if config is None else config
    return capacity_rows(target_sizes(module, config), config.rank, counts, base_bits)


def capacity_rows(
    sizes: Mapping[str, AdapterSizes], rank: int, counts: DataCounts, base_bits: BaseBits | None = None
) -> list[CapacityRow]:
    """The rows of ranks 1 to 512 and of ``rank``, for each target set of `target_sizes`."""
    ranks = sorted({*RANKS, rank})
    return [
        capacity_row(targets, each, size.parameters(each), counts, base_bits)
        for targets, size in sizes.items()
        for each in ranks
    ]


def target_sizes(module: nn.Module, config: LoRAConfig) -> dict[str, AdapterSizes]:
    """Each target set that ``module`` has to the sizes of its adapters, the targets of ``config`` first."""
    own = config.targets if isinstance(config.targets, str) else ", ".join(config.targets)
    found = {own: adapter_sizes(module, config)}
    for targets in ("all", "attention", "mlp", "experts"):
        if targets == own:
            continue
        try:
            found[targets] = adapter_sizes(module, with_targets(config, targets))
        except (TargetNotFoundError, ConfigError):
            continue  # the module has no such layers, or they cannot start or share weights as these settings ask
    return found


def capacity_row(
    targets: str, rank: int, parameters: int, counts: DataCounts, base_bits: BaseBits | None = None
) -> CapacityRow:
    """The row of one rank, from its number of trained parameters."""
    bits = counts.bits if base_bits is None else base_bits.bits
    ratio_a = None if counts.unique_supervised_tokens is None else counts.unique_supervised_tokens / parameters
    ratio_b = None if bits is None else bits / (BITS_PER_PARAMETER * parameters)
    return CapacityRow(rank, targets, parameters, ratio_a, ratio_b, _verdict(ratio_a, ratio_b))


def needed_rank(rows: Sequence[CapacityRow]) -> int | None:
    """The lowest rank that is inside both bounds, for the first target set of a table; None if there is none.

    Data whose rules can be learned without memorising every row need less.
    """
    inside = [row.rank for row in rows if row.targets == rows[0].targets and row.verdict == "inside"]
    return min(inside, default=None)


def highest_rank(sizes: AdapterSizes) -> int:
    """The highest rank to recommend: 512, or a quarter of the narrowest adapted weight, as a power of two."""
    return max((rank for rank in RANKS if rank <= sizes.narrowest // 4), default=1)


def _verdict(ratio_a: float | None, ratio_b: float | None) -> str:
    if ratio_a is None or ratio_b is None:
        return "cannot tell"
    for word, (most_a, most_b) in (("inside", _INSIDE), ("tight", _TIGHT)):
        if ratio_a <= most_a and ratio_b <= most_b:
            return word
    return "over"
