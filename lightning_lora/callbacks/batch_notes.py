"""What a user is told of the batch before anything is measured."""

from __future__ import annotations

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_lora.batch_state import GOOD_STEPS, LARGEST_SWEPT, BatchReading, advice
from lightning_lora.effective_batch import EffectiveBatch


def announce_batch(batch: EffectiveBatch, reading: BatchReading, num_steps: float, is_packed: bool) -> None:
    """Say what a step takes and how many steps there are; warn if they are few.

    Args:
        batch: Of a step.
        reading: Of this batch; it knows no noise yet.
        num_steps: Optimizer steps of the whole run.
        is_packed: Whether rows hold several examples.
    """
    rank_zero_info(f"{batch}, {num_steps:.0f} optimizer steps")
    if reading.state == "step-starved":
        rank_zero_warn(advice(reading, batch, num_steps))
    elif num_steps < GOOD_STEPS:
        rank_zero_info(f"runs of {GOOD_STEPS} steps and more learn best: a smaller batch makes more of them")
    if batch.rows > LARGEST_SWEPT:
        rank_zero_info(f"published sweeps of fine-tuning end at {LARGEST_SWEPT} rows a step")
    if is_packed:
        rank_zero_info("rows are packed: the noise scale counts packed rows, not the examples in them")
