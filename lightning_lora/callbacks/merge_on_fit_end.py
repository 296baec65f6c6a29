"""A merged model, written at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_lora.errors import AdapterStateError, CallbackSettingError, ConfigError, check_arguments
from lightning_lora.files.merge.merged_model import save_merged
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.mixin.held_base import base_as_stored
from lightning_lora.mixin.no_batches import refuse_no_batches
from lightning_lora.trainer_access import run_folder


class MergeOnFitEnd(Callback):
    """Writes the model with its adapters folded in when ``fit`` ends; the module keeps its adapters.

    The weights are written in the types they have. A base that mixed precision holds in another type than its files
    have is written in that of the files, as ``lightning-lora merge`` writes it.

    Args:
        dirpath: Folder to write. None: ``merged`` in the run folder.

    Raises:
        ConfigError: If the strategy shards the weights, or nothing is adapted.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        check_arguments(MergeOnFitEnd, locals(), CallbackSettingError)
        self.dirpath = dirpath

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse sharded weights before the run begins."""
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise AdapterStateError(
                f"MergeOnFitEnd cannot merge the sharded weights of {type(trainer.strategy).__name__}; write adapters "
                f"with AdapterCheckpoint and run `lightning-lora merge BASE ADAPTER OUT` afterwards."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run without adapters."""
        if not lora_layers(pl_module):
            raise AdapterStateError("MergeOnFitEnd has nothing to merge: the module has no adapters (lora is null).")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the merged model; only rank 0 writes, but all ranks must ask for the run folder."""
        refuse_no_batches(trainer)  # callbacks come before the module, which would refuse
        folder = self.dirpath or Path(run_folder(trainer), "merged")
        if trainer.is_global_zero:
            with base_as_stored(pl_module):
                path = save_merged(pl_module, folder, _tokenizer(pl_module))
            rank_zero_info(f"merged model written to {path}")


def tokenizer_of(module: LightningModule) -> Any:
    """The tokenizer of the module's latest run; None where it has none that can be written.

    Raises:
        ConfigError: If the tokenizer of a task of this package cannot be loaded.
    """
    # The tasks of this package know with which chat template they were trained.
    found = getattr(module, "trained_tokenizer", None) or getattr(module, "tokenizer", None)
    return found if hasattr(found, "save_pretrained") else None


def _tokenizer(module: LightningModule) -> Any:
    try:
        return tokenizer_of(module)
    except ConfigError as error:
        rank_zero_warn(f"the merged model has no tokenizer: {error}")
        return None
