"""The rows of a loader, where Lightning changes their order or repeats some."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DistributedSampler, SequentialSampler


def tell_of_rows(trainer: Trainer, stage: RunningStage, given: Any, prepared: Any) -> None:
    """Tell what is not as the loader has it, on several devices or under a strategy for them.

    Args:
        trainer: The Trainer.
        stage: What the loader is for.
        given: The loader.
        prepared: The loader that Lightning uses.
    """
    if stage == RunningStage.TRAINING:
        _tell_if_shuffled(given, prepared)
    elif stage in (RunningStage.VALIDATING, RunningStage.TESTING):
        _warn_if_repeated(trainer, stage, prepared)


def _tell_if_shuffled(given: Any, prepared: Any) -> None:
    sampler = getattr(prepared, "sampler", None)
    is_in_order = isinstance(getattr(given, "sampler", None), SequentialSampler)
    if is_in_order and isinstance(sampler, DistributedSampler) and sampler.shuffle:
        rank_zero_info(
            "the training loader does not shuffle, and Lightning does under this strategy, even with one process: it "
            "gives the loader a DistributedSampler(shuffle=True). To keep the order, give the loader a "
            "DistributedSampler(shuffle=False) of your own."
        )


def _warn_if_repeated(trainer: Trainer, stage: RunningStage, loader: Any) -> None:
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    if not isinstance(sampler, DistributedSampler) or not hasattr(sampler, "total_size"):
        return
    rows, devices = len(sampler.dataset), sampler.num_replicas  # pyright: ignore[reportArgumentType]
    repeated, limit = sampler.total_size - rows, getattr(trainer, f"limit_{stage.dataloader_prefix}_batches")
    is_whole = limit >= len(loader) if isinstance(limit, int) else limit == 1.0
    if repeated > 0 and is_whole:
        rank_zero_warn(
            f"{stage.value}: {rows} rows are evaluated as {sampler.total_size} on {devices} devices: the sampler "
            f"repeats {repeated} of them so that all devices have as many, and these count more than once in what is "
            f"logged. Evaluate on one device, or a number of rows that {devices} divides; the data modules of "
            f"lightning_lora count every row once."
        )
