"""What a step of many equal blocks takes, from steps of a few: every segment of a step grows along a line.

The peak of a step is not on a line: with more blocks another moment may be the largest. But what is alive at one moment
is: between the same two marks the same blocks have stored activations or gradients. So a line goes through each
segment, and the largest segment of the deep step is its peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_lora.memory.equal_blocks import MIDDLE
from lightning_lora.memory.live_bytes import Segment

DEPTHS = (3, 4, 5)
"""Numbers of blocks that are traced: two for a line, and one that must be on it."""
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Traced:
    """A traced step.

    Args:
        peaks: Bytes by kind at the peak of each segment.
        flops: Operations of forward and backward of one micro-batch.
        attention_flops: The operations of attention among them.
    """

    peaks: Mapping[Segment, Mapping[str, int]]
    flops: int
    attention_flops: int = 0

    @property
    def peak(self) -> Mapping[str, int]:
        """Bytes by kind at the peak of the step."""
        return max(self.peaks.values(), key=lambda parts: sum(parts.values()))


def at_depth(traced: Mapping[int, Traced], depth: int) -> Traced | None:
    """The step with ``depth`` blocks, from traces with the numbers of blocks in `DEPTHS`.

    None if the traces are not on one line, within 0.1 %.
    """
    one, two, three = (traced[number] for number in DEPTHS)
    if one.peaks.keys() != _outer(two) or one.peaks.keys() != _outer(three):
        return None
    if two.flops - one.flops != three.flops - two.flops:
        return None
    peaks: dict[Segment, dict[str, int]] = {}
    for segment, parts in one.peaks.items():
        expected, found = _line(parts, two.peaks[segment], 1), three.peaks[segment]
        if sum(abs(found[kind] - expected[kind]) for kind in found) > _TOLERANCE * sum(found.values()):
            return None
        peaks[segment] = _line(two.peaks[segment], found, depth - DEPTHS[2])
    further = depth - DEPTHS[2]
    attention = three.attention_flops + further * (three.attention_flops - two.attention_flops)
    return Traced(peaks, three.flops + further * (three.flops - two.flops), attention)


def _outer(traced: Traced) -> set[Segment]:
    """All segments but those of blocks in the middle, which hold no more than one beside them."""
    return {segment for segment in traced.peaks if MIDDLE not in segment}


def _line(low: Mapping[str, int], high: Mapping[str, int], further: int) -> dict[str, int]:
    return {kind: high[kind] + further * (high[kind] - low[kind]) for kind in high}
