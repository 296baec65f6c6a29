"""``lightning-lora probe``: trains as ``fit`` does, tries other batch sizes or a higher rank, and writes no run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from typing_extensions import override

from lightning_lora.callbacks import AdapterCheckpoint, AdaptiveAccumulation, BatchSizeMonitor, MergeOnFitEnd
from lightning_lora.cli.preview import preview_data
from lightning_lora.errors import GuardError, ProbeError
from lightning_lora.study.batch_probe import BatchProbe
from lightning_lora.study.probe import Probe
from lightning_lora.study.rank_probe import RankProbe
from lightning_lora.trainer_access import found

AT = 100
"""Default number of optimizer steps before a probe of batches; the noise scale is measured from step 50 on."""
_REMOVED = (Checkpoint, AdapterCheckpoint, MergeOnFitEnd, AdaptiveAccumulation)


class ProbingTrainer(Trainer):
    """Lightning's Trainer with three more methods, `probe`, `preview` and `plan`."""

    def probe(
        self,
        model: LightningModule,
        train_dataloaders: TRAIN_DATALOADERS | LightningDataModule | None = None,
        val_dataloaders: EVAL_DATALOADERS | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train for a while, try other batch sizes or a higher rank on the rows that come next, and report.

        Args:
            model: The module to train.
            train_dataloaders: Training data, unless a data module is given.
            val_dataloaders: Validation data, unless a data module is given.
            datamodule: A data module with training data.
            ckpt_path: A checkpoint of ``fit`` to start from; the probe runs at step ``at``, or after the next step.
            weights_only: Load the checkpoint without unpickling. None: as Lightning decides.

        Raises:
            GuardError: If the run ended before the probe.
        """
        probe = found(self, BatchProbe) or found(self, RankProbe)
        assert probe is not None
        try:
            self.fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
        except SIGTERMException as stop:
            raise SystemExit(143) from stop  # Lightning would exit with code 0
        if probe.result is None:
            raise GuardError(f"the run ended at step {self.global_step}, before the probe at {probe.at:g}.")

    def preview(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Show three rows as the model sees them, the trained tokens marked, and what of the data is used.

        Args:
            model: The module that would be trained; its weights are not loaded.
            datamodule: The data module whose rows are shown.
            ckpt_path: Not used; it may stand in the config of a run.
            weights_only: Not used, likewise.
        """
        self.strategy.connect(model)
        preview_data(self, datamodule)

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Check that there is something to plan; the plan itself is made from the module and the data module.

        Args:
            model: The module that would be trained; its weights are not loaded.
            datamodule: The data module with its training rows.
            ckpt_path: Not used; it may stand in the config of a run.
            weights_only: Not used, likewise.

        Raises:
            ConfigError: If there is no data module.
        """
        if datamodule is None:
            raise ProbeError("plan counts the rows of a data module, and none is given: add data: to the config.")


def choose_probe(callbacks: list[Callback], of_rank: bool) -> Probe:
    """Take the probe that was not asked for out of ``callbacks``, and return the other.

    Args:
        callbacks: Among them a `BatchProbe` and a `RankProbe` with the settings of the command; modified in place.
        of_rank: Whether ``--rank`` was given.

    Raises:
        ConfigError: If the one that was not asked for was given settings.
    """
    probes = {type(callback): callback for callback in callbacks if isinstance(callback, Probe)}
    chosen, other = probes[RankProbe if of_rank else BatchProbe], probes[BatchProbe if of_rank else RankProbe]
    defaults = vars(BatchProbe(at=AT, stop=True) if of_rank else RankProbe(stop=True))
    if given := [name for name, value in vars(other).items() if value != defaults[name]]:
        option, advice = ("batch_probe", "drop it, or drop --rank") if of_rank else ("rank_probe", "add --rank")
        raise ProbeError(f"{option}.{given[0]} is a setting of the other probe: {advice}.")
    callbacks.remove(other)
    return chosen


def prepare_probe(config: dict[str, Any], probe: Probe) -> None:
    """Change the arguments of a Trainer for `ProbingTrainer.probe`: a folder of its own, no logger, no checkpoints.

    Args:
        config: Arguments of a Trainer; modified in place.
        probe: The probe that will run.

    Raises:
        ConfigError: If the callbacks hold a probe.
    """
    given = config.get("callbacks") or []
    callbacks: list[Callback] = [each for each in (given if isinstance(given, list) else [given])]
    if own := next((callback for callback in callbacks if isinstance(callback, Probe)), None):
        raise ProbeError(f"the config has a {type(own).__name__} of its own: remove it, or run `fit`, where it works.")
    if isinstance(probe, BatchProbe) and not any(isinstance(callback, BatchSizeMonitor) for callback in callbacks):
        callbacks.append(BatchSizeMonitor())
    folder = "rank_probe" if isinstance(probe, RankProbe) else "batch_probe"
    config["callbacks"] = [*(each for each in callbacks if not isinstance(each, _REMOVED)), _NoValidation()]
    config["default_root_dir"] = str(Path(config.get("default_root_dir") or ".") / folder)
    config |= {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}


class _NoValidation(Callback):
    """Switches validation off: the probe computes its own losses, and Lightning validates when a run stops."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.limit_val_batches = 0
