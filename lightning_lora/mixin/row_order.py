"""The order of the training rows, where it is not that of their loader."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DistributedSampler, SequentialSampler


def tell_if_shuffled(given: Any, prepared: Any) -> None:
    """Tell that Lightning shuffles rows whose loader does not, as it does under every strategy with processes."""
    sampler = getattr(prepared, "sampler", None)
    is_in_order = isinstance(getattr(given, "sampler", None), SequentialSampler)
    if is_in_order and isinstance(sampler, DistributedSampler) and sampler.shuffle:
        rank_zero_info(
            "the training loader does not shuffle, and Lightning does under this strategy, even with one process: it "
            "gives the loader a DistributedSampler(shuffle=True). To keep the order, give the loader a "
            "DistributedSampler(shuffle=False) of your own."
        )
