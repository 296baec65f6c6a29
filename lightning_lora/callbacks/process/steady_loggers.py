"""A run that goes on when its logger fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_lora.lora.layers.class_swap import mix_in


class SteadyLoggers(Callback):
    """Lets a run go on when a logger raises, as on a full disk or with a lost server.

    The first failure of a logger gives a warning, and the end of the run another one with the number of failures. The
    class of each logger is replaced by one that catches what its methods raise. A CSV logger keeps the rows that it
    could not write and writes them when it can again. An error while a logger is made still ends the run.

    Attributes:
        gaps: For each logger that has failed, by class name and position: the first and the last step at which it
            failed, and the number of failures.
    """

    def __init__(self) -> None:
        self.gaps: dict[str, tuple[int, int, int]] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Catch what the loggers raise from now on."""
        self.gaps = {}
        for position, logger in enumerate(trainer.loggers):
            name = f"{type(logger).__name__} {position}"
            steady = logger if isinstance(logger, _Steady) else mix_in(logger, _Steady)
            steady.lora_failed = self._recorder(trainer, name)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn of each logger whose logs have a gap."""
        for name, (first, last, count) in self.gaps.items():
            rank_zero_warn(
                f"the logs of {name} have a gap: it failed {count} times between steps {first} and {last}, and what it "
                f"was given then may be missing."
            )

    def _recorder(self, trainer: Trainer, name: str) -> Callable[[str, Exception], None]:
        """A function that a logger calls with the name of the method that failed and its error."""

        def record(method: str, error: Exception) -> None:
            step = trainer.global_step
            first, _, count = self.gaps.get(name, (step, step, 0))
            self.gaps[name] = first, step, count + 1
            if count == 0:
                rank_zero_warn(
                    f"{name} failed in {method} at step {step}: {type(error).__name__}: {error}. Training goes on; "
                    f"further failures are counted and reported at the end."
                )

        return record


def _caught(method: str) -> Callable[..., Any]:
    def call(self: _Steady, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(super(_Steady, self), method)(*args, **kwargs)
        except Exception as error:
            self.lora_failed(method, error)

    call.__name__ = method
    return call


class _Steady(Logger):
    """Comes before a logger's own class: errors of its methods are recorded instead of raised."""

    lora_failed: Callable[[str, Exception], None]

    log_metrics = _caught("log_metrics")
    log_hyperparams = _caught("log_hyperparams")
    log_graph = _caught("log_graph")
    save = _caught("save")
    after_save_checkpoint = _caught("after_save_checkpoint")
    finalize = _caught("finalize")
