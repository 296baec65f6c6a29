"""The verdict of a plan in words, and what its data say beside it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_lora.planning.advice.method import NAMES, Method
from lightning_lora.planning.base_bits import BaseBits
from lightning_lora.planning.capacity import CapacityRow
from lightning_lora.planning.data_counts import DataCounts


def sentence(
    method: Method, counts: DataCounts, rows: Sequence[CapacityRow], most: int, budget: int, change: str | None
) -> str:
    """One or two sentences: is LoRA enough, at which rank; or what does not fit and what would make it fit."""
    if not method.fits:
        rank = "" if method.rank is None else f" at rank {method.rank}"
        return (
            f"nothing fits into {_size(budget)}: not even {NAMES[method.name]}{rank} with one row. "
            f"The smallest change: {change}."
        )
    largest = max((row for row in rows if row.rank <= most), key=lambda row: row.rank, default=rows[0])
    if method.name == "full":
        return (
            f"full fine-tuning: {_amount(counts)} are more than adapters can surely hold "
            f"({largest.parameters:,} parameters at rank {largest.rank}), and it fits."
        )
    what = f"{NAMES[method.name]} at rank {method.rank}"
    row = next((row for row in rows if row.rank == method.rank), largest)
    if method.verdict == "cannot tell":
        return f"{what}; cannot tell whether it is enough: the information in the targets is not known."
    told = f"{_amount(counts)}, {row.parameters:,} parameters; an upper bound on the need"
    if method.verdict == "inside":
        return f"{what} is enough: the data is inside its capacity ({told})."
    if method.verdict == "tight":
        return f"{what} is tight: the data may fill it ({told})."
    return f"{what}, though the data is over its capacity ({told}): expect slower learning than in full."


def notes_on_data(counts: DataCounts, bits: BaseBits | None) -> tuple[str, ...]:
    """What else the counts say: repeated rows, and the bits of the base model."""
    notes = []
    duplicates = counts.duplicate_rows or 0
    if counts.rows and duplicates == counts.rows - 1 and counts.rows > 1:
        notes.append(f"all {counts.rows:,} rows are the same row: there is one row to learn")
    elif counts.rows and duplicates >= 0.1 * counts.rows:
        share = duplicates / counts.rows
        notes.append(f"{share:.0%} of the rows repeat others; they count once for capacity, each time for steps")
    if bits is not None:
        notes.append(
            f"the base needs {bits.bits:,.0f} bits for the targets (95 %: {bits.low:,.0f} to {bits.high:,.0f}), "
            f"measured on {bits.rows:,} rows"
        )
    return tuple(notes)


def _amount(counts: DataCounts) -> str:
    number = counts.unique_supervised_tokens
    return "the targets" if number is None else f"{number:,} unique {counts.unit}"


def _size(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"
