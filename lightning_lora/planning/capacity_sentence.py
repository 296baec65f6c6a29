"""The verdict on the capacity of adapters in words."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_lora.errors import PlanError
from lightning_lora.planning.base_bits import BaseBits
from lightning_lora.planning.capacity import CapacityRow, needed_rank
from lightning_lora.planning.data_counts import DataCounts


def capacity_sentence(
    rows: Sequence[CapacityRow], counts: DataCounts, rank: int, base_bits: BaseBits | None = None
) -> str:
    """One or two sentences on the room that adapters of a rank have for the data; it speaks of bounds only.

    Args:
        rows: A capacity table; its first target set counts.
        base_bits: The bits of the base, if the table was made with them.

    Raises:
        ConfigError: If the table has no such rank.
    """
    own = {row.rank: row for row in rows if row.targets == rows[0].targets}
    if rank not in own:
        raise PlanError(f"the table has no rank {rank}: it has {', '.join(map(str, own))}.")
    row, lowest = own[rank], needed_rank(rows)
    adapters = f"the {row.parameters:,} trained parameters of rank {rank} ({row.targets})"
    if row.verdict == "cannot tell":
        return (
            f"Nothing is known of the information in these targets, so nobody can tell before training whether "
            f"{adapters} have room for it."
        )
    amount = amount_to_learn(counts, base_bits)
    if row.verdict == "inside":
        less = "" if lowest in (None, rank) else f" The bound would be kept at rank {lowest} already."
        return f"{amount} fit into {adapters}.{less}"
    others = (
        f"Rank {lowest} keeps the bound."
        if lowest is not None
        else f"No rank up to {max(own)} keeps the bound; whether more rank helps can only be measured (RankProbe)."
    )
    if row.verdict == "tight":
        return f"{amount} would nearly fill {adapters}. {others}"
    return (
        f"{amount} are more than {adapters} can surely hold: learning may become slower than in full fine-tuning, "
        f"though it does not stop. {others}"
    )


def amount_to_learn(counts: DataCounts, base_bits: BaseBits | None) -> str:
    """What the data hold and how that was judged, as the subject of a sentence."""
    noun = "trained tokens" if counts.unit == "tokens" else "labels"
    amount = f"{counts.unique_supervised_tokens:,} {noun} in unique rows"
    if base_bits is not None:
        return f"{amount} ({base_bits.bits:,.0f} bits for the base, an upper bound on what there is to learn)"
    if counts.unit == "tokens":
        return f"{amount}, at an assumed bit for each,"
    return f"{amount} ({counts.bits:,.0f} bits, an upper bound on what there is to learn)"
