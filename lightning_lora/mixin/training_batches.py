"""What Lightning says nothing of: a run without a batch, and rows that it shuffles though their loader does not."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DistributedSampler, SequentialSampler

from lightning_lora.errors import DataSettingError
from lightning_lora.lightning_private import training_loaders


def refuse_no_batches(trainer: Trainer) -> None:
    """Refuse a fit whose training data made no batch, unless ``limit_train_batches=0`` asks for that.

    No hook runs between the loaders and the end of such a fit, so this is called at its end.

    Raises:
        ConfigError: If the loaders were made and have no batch.
    """
    loop = trainer.fit_loop
    if not training_loaders(trainer) or loop.max_batches != 0 or trainer.limit_train_batches == 0:
        return
    raise DataSettingError(f"there is no batch to train on: {_why(trainer.train_dataloader)}")


def _why(loader: Any) -> str:
    rows, size = _length(getattr(loader, "dataset", None)), getattr(loader, "batch_size", None)
    if not rows or not getattr(loader, "drop_last", False):
        return "the training data has no rows for this process. Check what train_dataloader reads."
    return (
        f"the training data has {rows} rows, and batch_size={size} with drop_last=True drops the last batch, which is "
        f"the only one. Set drop_last=False, or a lower batch_size."
    )


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


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
