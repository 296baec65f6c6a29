"""Adapter folders in PEFT's format, written during training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lora.errors import CallbackSettingError, ConfigError, check_arguments, did_you_mean
from lightning_lora.files.adapter.save_load import save_adapter
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.shards import full_parameters, reshard
from lightning_lora.trainer_access import run_folder

from .adapter_ema import averaged
from .merge_on_fit_end import tokenizer_of


class AdapterCheckpoint(Callback):
    """Writes the adapter as a folder that PEFT loads: ``last`` after every validation and at the end, and ``best``.

    The folders hold weights only, with `AdapterEMA` the averaged weights. To continue a run use the checkpoints of
    Lightning's ``ModelCheckpoint``. The module's ``tokenizer``, if it has one, is written beside the weights.

    Args:
        dirpath: Folder in which ``last`` and ``best`` are written. None: ``adapters`` in the run folder.
        monitor: Logged metric that decides which adapter is ``best``. None: only ``last`` is written.
        mode: ``"min"`` if a lower value of the metric is better, ``"max"`` if a higher one is.

    Raises:
        ConfigError: If ``mode`` is unknown, or the monitored metric is not logged.
    """

    def __init__(self, dirpath: str | None = None, monitor: str | None = None, mode: str = "min") -> None:
        check_arguments(AdapterCheckpoint, locals(), CallbackSettingError)
        if mode not in ("min", "max"):
            raise CallbackSettingError(f"mode must be min or max, got {mode!r}.")
        self.dirpath = dirpath
        self.monitor = monitor
        self.mode = mode
        self.best_score: float | None = None
        self._saved_step = -1

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the user when there are no adapters."""
        self._saved_step = -1
        if not lora_layers(pl_module):
            rank_zero_info("AdapterCheckpoint writes nothing: the module has no adapters.")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``last``, and ``best`` if the metric has improved."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._save(trainer, pl_module, "last")
        self._saved_step = trainer.global_step
        if self.monitor is not None:
            score = self._score(trainer)
            if self._is_best(score):
                self.best_score = score
                self._save(trainer, pl_module, "best")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``last`` unless it was written after this step already."""
        if trainer.global_step != self._saved_step:
            self._save(trainer, pl_module, "last")

    @override
    def state_dict(self) -> dict[str, Any]:
        """The best score: a resumed run must not overwrite a better adapter."""
        return {"best_score": self.best_score}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score."""
        self.best_score = state_dict["best_score"]

    def _score(self, trainer: Trainer) -> float:
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise CallbackSettingError(
                f"AdapterCheckpoint monitors {self.monitor!r}, which is not logged"
                f"{did_you_mean(str(self.monitor), metrics)} Logged: {', '.join(metrics) or 'nothing'}."
            )
        # Ranks may have measured different values, but writing is a collective: all must take the same decision.
        return float(trainer.strategy.broadcast(float(metrics[self.monitor])))

    def _is_best(self, score: float) -> bool:
        if math.isnan(score) or self.best_score is None:
            return not math.isnan(score)
        return score < self.best_score if self.mode == "min" else score > self.best_score

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        if not lora_layers(pl_module):
            return
        reshard(pl_module)
        folder = Path(self.dirpath) if self.dirpath else Path(run_folder(trainer), "adapters")
        facts = {key: float(value) for key, value in trainer.callback_metrics.items()}
        summary = {"step": trainer.global_step, "epoch": trainer.current_epoch} | facts
        # The metrics in the summary were measured with the average.
        with averaged(trainer, pl_module), full_parameters(trainer.strategy.model or pl_module):
            save_adapter(pl_module, folder / name, summary, _tokenizer(trainer, pl_module))
        trainer.strategy.barrier("adapter written")


def _tokenizer(trainer: Trainer, module: LightningModule) -> Any:
    try:
        return tokenizer_of(module) if trainer.is_global_zero else None
    except ConfigError:  # a model without a tokenizer; whoever loads the adapter needs none either
        return None
