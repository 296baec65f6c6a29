"""Whether arms side by side take turns or share batches, where nobody has said it."""

from __future__ import annotations

from collections.abc import Iterable

FEW_TOKENS = 128
"""Tokens of an arm's batch up to which sharing batches was faster on a CPU: by 28 % at 128, not at 1,024
(docs/use/arms_side_by_side.md)."""


def chosen_mode(reasons: Iterable[str], tokens: int | None, is_cpu: bool) -> tuple[str, str]:
    """``turns`` or ``rows``, and why.

    Taking turns gives the numbers of separate runs bit for bit; sharing batches gives them up to rounding, and is
    chosen only where it is known to be faster.

    Args:
        reasons: Of each arm why it cannot share batches; "" for an arm of which nothing is known to speak against it.
        tokens: Most tokens of an arm's batch; None if they are not known.
        is_cpu: Whether the arms are trained on a CPU, where both were measured.
    """
    if reason := next(filter(None, reasons), ""):
        return "turns", f"they cannot share batches: {reason}"
    if not is_cpu:
        return "turns", "whether sharing batches is faster was not measured on a GPU; arms_mode: rows tries it"
    if tokens is None:
        return "turns", f"sharing batches is faster up to about {FEW_TOKENS} tokens each, and theirs are not known"
    if tokens > FEW_TOKENS:
        return "turns", f"batches of up to {tokens:,} tokens; sharing them is faster up to about {FEW_TOKENS}"
    return "rows", f"of {tokens:,} tokens at most, which is faster; equal to separate runs up to rounding"
