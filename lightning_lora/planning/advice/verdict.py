"""The verdict of a plan in words, and what its data say beside it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_lora.lora.config import LoRAConfig
from lightning_lora.planning.adapter_sizes import AdapterSizes
from lightning_lora.planning.advice.method import NAMES, Method
from lightning_lora.planning.advice.settings import FEW_STEPS
from lightning_lora.planning.base_bits import BaseBits
from lightning_lora.planning.capacity import CapacityRow
from lightning_lora.planning.capacity_sentence import amount_to_learn, capacity_sentence
from lightning_lora.planning.data_counts import DataCounts


def sentence(
    method: Method,
    counts: DataCounts,
    rows: Sequence[CapacityRow],
    bits: BaseBits | None,
    most: int,
    budget: int,
    change: str | None,
    is_traced: bool = True,
) -> str:
    """Is LoRA enough, and at which rank; or what does not fit, and what would make it fit.

    Args:
        method: The recommended method.
        counts: What the data hold.
        rows: The capacity table.
        bits: The bits of the base, if the table was made with them.
        most: The highest sensible rank.
        budget: Bytes of a device.
        change: The smallest change that would make the method fit.
        is_traced: Whether the memory of the method is known.
    """
    if not method.fits:
        rank = "" if method.rank is None else f" at rank {method.rank}"
        return (
            f"nothing fits into {_size(budget)}: not even {NAMES[method.name]}{rank} with one row. "
            f"The smallest change: {change}."
        )
    unknown = "" if is_traced else " Its memory could not be traced: whether it fits is not known."
    if method.rank is None:
        own = [row for row in rows if row.targets == rows[0].targets and row.rank <= most]
        room = f" ({own[-1].parameters:,} parameters at rank {own[-1].rank}, the highest sensible one)" if own else ""
        what = "full fine-tuning, which fits" if is_traced else "full fine-tuning"
        return f"{what}: {amount_to_learn(counts, bits)} are more than adapters can surely hold{room}.{unknown}"
    what = f"{NAMES[method.name]} at rank {method.rank}"
    if is_one_row(counts):
        what = f"all {counts.rows:,} rows are the same row, so there is one row to learn; {what}"
    judged = {
        "inside": f"{what} should be enough: ",
        "tight": f"{what} is tight: ",
        "over": f"{what}, though the data is over its capacity: ",
        "cannot tell": f"{what}; cannot tell whether it is enough. ",
    }
    return judged[method.verdict] + capacity_sentence(rows, counts, method.rank, bits) + unknown


def beside(rows: Sequence[CapacityRow], asked: int, method: Method, steps: int) -> str:
    """What a verdict leaves out: the rank that the config asks for, if it is another one, and steps that are too few.

    Args:
        asked: The rank of the config; the default is no wish.
    """
    words = {"inside": "would do too", "tight": "would be tight", "over": "is over its capacity"}
    own = {row.rank: row for row in rows if row.targets == rows[0].targets}
    said = ""
    if asked not in (LoRAConfig.rank, method.rank) and asked in own and own[asked].verdict in words:
        said += f" Rank {asked}, which the config has, {words[own[asked].verdict]}."
    if steps < FEW_STEPS:
        said += f" But {steps:,} optimizer step{' is' if steps == 1 else 's are'} too few to learn it."
    return said


def is_one_row(counts: DataCounts) -> bool:
    """Whether all rows repeat the first."""
    return counts.rows is not None and counts.rows > 1 and counts.duplicate_rows == counts.rows - 1


def notes_on_data(counts: DataCounts, bits: BaseBits | None) -> tuple[str, ...]:
    """What else the counts say: repeated rows, and the bits of the base model or that they are assumed."""
    notes = []
    duplicates = counts.duplicate_rows or 0
    if counts.rows and duplicates >= 0.1 * counts.rows and not is_one_row(counts):
        share = duplicates / counts.rows
        notes.append(f"{share:.0%} of the rows repeat others; they count once for capacity, each time for steps")
    if counts.rows and counts.counted_rows and counts.counted_rows < counts.rows:
        notes.append(f"{counts.counted_rows:,} of {counts.rows:,} rows were read; counts are scaled up from these")
    if bits is not None:
        unit = counts.unit.removesuffix("s")
        each = bits.bits / max(1, counts.unique_supervised_tokens or 1)
        notes.append(
            f"measured: the base needs {bits.bits:,.0f} bits for the targets, {each:.3g} for each {unit} (95 %: "
            f"{bits.low:,.0f} to {bits.high:,.0f} bits; {bits.rows:,} rows were read)"
        )
    elif counts.unit == "tokens" and counts.bits is not None:
        notes.append(
            "1 bit a token is assumed, about right for large pretrained models (TML); weak ones need up to 7: --measure"
        )
    return tuple(notes)


def notes_on_adapters(sizes: AdapterSizes, config: LoRAConfig, rank: int | None) -> tuple[str, ...]:
    """What a rank does not tell: layers that cannot hold it, and layers with a rank of their own.

    Args:
        config: The settings; the rank that they ask for counts too.
        rank: The rank of the plan; None for full fine-tuning.
    """
    notes = []
    asked = max(config.rank if config.rank != LoRAConfig.rank else 0, rank or 0)
    if below := sizes.weights_below(asked):
        whose = "" if asked == rank else " of the config"
        notes.append(
            f"rank {asked}{whose} is more than {below:,} of {sizes.num_weights:,} adapted layers can hold; they get "
            f"their full rank instead"
        )
    if sizes.num_fixed and rank is not None:
        notes.append(
            f"rank_pattern sets the rank of {sizes.num_fixed:,} of {sizes.num_weights:,} adapted layers, at every rank "
            f"of the table; the rank of this plan is that of the others"
        )
    return tuple(notes)


def _size(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"
