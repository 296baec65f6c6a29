"""Private attributes of Lightning 2.6 that several rooms need, each under a name that says what it gives.

Attributes that one file alone uses stay there: loop counters and restart flags in `checkpoints.loop_position`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.tuner.lr_finder import _ExponentialLR, _LinearLR
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Trainer of ``module``, or None without one; ``module.trainer`` raises then."""
    return module._trainer


def training_loader_source(trainer: Trainer) -> _DataLoaderSource:
    """Maker of the training loaders: ``instance`` is a module, data module or loader, ``dataloader()`` makes them."""
    return trainer.fit_loop._data_source


def wrap_training_loader(trainer: Trainer, module: LightningModule, wrap: Callable[[Any], Any]) -> None:
    """Let ``trainer`` train ``module`` on ``wrap(loader)``, of the training loader with its sampler for each rank."""
    source = training_loader_source(trainer)

    def wrapped(loader: Any) -> Any:
        if trainer.lightning_module is not module:  # a later fit of another module
            return loader
        return wrap(trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING))

    trainer.fit_loop._data_source = _WrappedSource(source.instance, source.name, wrapped)


def follow_loaders(trainer: Trainer, tell: Callable[[Trainer, RunningStage, Any, Any], None]) -> None:
    """Call ``tell`` with each loader of a stage as it was given, and as it is with its sampler for each rank."""
    connector = trainer._data_connector
    if not isinstance(connector._prepare_dataloader, _FollowedPreparation):
        connector._prepare_dataloader = _FollowedPreparation(connector, tell)


class _FollowedPreparation:
    """Stands in for the method of one Trainer; a class, so that the Trainer can still be pickled."""

    def __init__(self, connector: Any, tell: Callable[[Trainer, RunningStage, Any, Any], None]) -> None:
        self._connector, self._tell = connector, tell

    def __call__(self, dataloader: Any, shuffle: bool, mode: RunningStage) -> Any:
        prepared = type(self._connector)._prepare_dataloader(self._connector, dataloader, shuffle, mode)
        self._tell(self._connector.trainer, mode, dataloader, prepared)
        return prepared


@dataclass
class _WrappedSource(_DataLoaderSource):
    wrap: Callable[[Any], Any]

    @override
    def dataloader(self) -> Any:
        return self.wrap(super().dataloader())


def training_loaders(trainer: Trainer) -> list[Any]:
    """All training loaders in one list; empty before Lightning has made them."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def training_fetcher(trainer: Trainer) -> _DataFetcher | None:
    """Iterator that fetches the training batches, or None before Lightning has made it."""
    return trainer.fit_loop._data_fetcher


def remake_training_loaders(trainer: Trainer) -> None:
    """Ask the source for training loaders again, in place of those already made."""
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.setup_data()


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the present batch only adds to the gradients: the optimizer steps at a later batch."""
    return trainer.fit_loop._should_accumulate()


def searching_schedule(trainer: Trainer) -> _ExponentialLR | _LinearLR | None:
    """Schedule by which Lightning searches for a learning rate at present; None if it does not."""
    schedules = (config.scheduler for config in trainer.lr_scheduler_configs)
    return next((schedule for schedule in schedules if isinstance(schedule, (_ExponentialLR, _LinearLR))), None)


def call_before_weights_return(prepare: Callable[[Trainer], None]) -> None:
    """Let ``prepare`` run in the calling process before Lightning loads there what child processes have trained.

    Between the start of ``fit`` and its end Lightning calls no hook in that process: those of ``ddp_spawn``,
    ``ddp_fork`` and ``ddp_notebook`` run in the children.
    """
    recover = _MultiProcessingLauncher._recover_results_in_main_process

    @functools.wraps(recover)
    def prepared(self: _MultiProcessingLauncher, worker_output: Any, trainer: Trainer) -> None:
        prepare(trainer)
        recover(self, worker_output, trainer)

    _MultiProcessingLauncher._recover_results_in_main_process = prepared


def trains_in_children(trainer: Trainer) -> bool:
    """Whether the run is in child processes of which the calling process takes the weights back at the end."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def is_trained(module: LightningModule, parameter: Tensor) -> bool:
    """Whether ``parameter`` is trained; ``toggle_optimizer`` freezes those of other optimizers for the time being."""
    before: Any = module._param_requires_grad_state  # by parameter, whatever its type says
    return before.get(parameter, parameter.requires_grad)


def averaged_model(callback: WeightAveraging) -> AveragedModel | None:
    """Copy of the module that ``callback`` averages into, or None outside ``fit``."""
    return callback._average_model
