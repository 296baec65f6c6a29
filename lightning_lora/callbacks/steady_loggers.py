"""Training that outlives its logger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override


class SteadyLoggers(Callback):
    """Lets a run go on whose logger raises, by a full disk or a lost server: one warning then, and the gap at the end.

    The class of each logger is swapped for one that catches what its methods raise. A CSV logger keeps the rows that it
    could not write and writes them when it can again. What a logger raises while it is made still ends the run.

    Attributes:
        gaps: For each logger that has failed, by class name and position: the first and the last step at which it did,
            and how often.
    """

    def __init__(self) -> None:
        self.gaps: dict[str, tuple[int, int, int]] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take hold of the loggers."""
        self.gaps = {}
        for position, logger in enumerate(trainer.loggers):
            name = f"{type(logger).__name__} {position}"
            if not isinstance(logger, _Steady):
                kind = type(logger)
                logger.__class__ = type(kind.__name__, (_Steady, kind), {"__module__": kind.__module__})
            assert isinstance(logger, _Steady)
            logger.lora_failed = self._noting(trainer, name)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what is missing."""
        for name, (first, last, count) in self.gaps.items():
            rank_zero_warn(
                f"the logs of {name} have a gap: it failed {count} times between steps {first} and {last}, and what it "
                f"was given then may be missing."
            )

    def _noting(self, trainer: Trainer, name: str) -> Callable[[str, Exception], None]:
        def note(method: str, error: Exception) -> None:
            step = trainer.global_step
            first, _, count = self.gaps.get(name, (step, step, 0))
            self.gaps[name] = first, step, count + 1
            if count == 0:
                rank_zero_warn(
                    f"{name} failed in {method} at step {step}: {type(error).__name__}: {error}. Training goes on; "
                    f"further failures are counted and told at the end."
                )

        return note


def _steady(method: str) -> Callable[..., Any]:
    def call(self: _Steady, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(super(_Steady, self), method)(*args, **kwargs)
        except Exception as error:
            self.lora_failed(method, error)

    call.__name__ = method
    return call


class _Steady(Logger):
    """In front of a logger's own class: its failures are noted."""

    lora_failed: Callable[[str, Exception], None]

    log_metrics = _steady("log_metrics")
    log_hyperparams = _steady("log_hyperparams")
    log_graph = _steady("log_graph")
    save = _steady("save")
    after_save_checkpoint = _steady("after_save_checkpoint")
    finalize = _steady("finalize")
