"""What one optimizer step learns from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EffectiveBatch:
    """Rows of an optimizer step. Accumulation and devices *multiply* the micro-batch; neither divides it.

    Args:
        micro_batch: Rows of one forward and backward pass on one device.
        accumulation: Passes of each device before a step.
        num_ranks: Devices with data of their own.
    """

    micro_batch: int
    accumulation: int
    num_ranks: int

    @property
    def rows(self) -> int:
        """Rows per optimizer step."""
        return self.micro_batch * self.accumulation * self.num_ranks

    def __str__(self) -> str:
        devices = "device" if self.num_ranks == 1 else "devices"
        return (
            f"effective batch {self.rows} = {self.micro_batch} rows x {self.accumulation} accumulated "
            f"x {self.num_ranks} {devices}"
        )
