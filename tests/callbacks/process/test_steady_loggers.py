"""A failing logger loses its rows but does not end the run (fault F21)."""

from __future__ import annotations

import csv
import errno
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_lora.callbacks import SteadyLoggers
from tests.support import toys
from tests.support.toys import Toy

pytestmark = [
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
]


class Logging(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Failing(CSVLogger):
    """A CSV logger whose disk is full at some steps."""

    def __init__(self, folder: Path, steps: range) -> None:
        super().__init__(folder, flush_logs_every_n_steps=1)
        self.steps, self.step = steps, -1

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.step = -1 if step is None else step
        super().log_metrics(metrics, step)

    def save(self) -> None:
        if self.step in self.steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().save()


def fit(folder: Path, logger: Any, **options: Any) -> Toy:
    torch.manual_seed(0)
    module = Logging()
    trainer = toys.trainer(folder, logger=logger, log_every_n_steps=1, max_epochs=2, **options)
    trainer.fit(module, toys.loader())
    return module


def steps_of(logger: CSVLogger) -> list[int]:
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_training_goes_on_with_one_warning_and_the_gap_at_the_end(tmp_path: Path) -> None:
    steady, logger = SteadyLoggers(), Failing(tmp_path, range(2, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = fit(tmp_path, logger, callbacks=[steady])
    told = [str(warning.message) for warning in caught if "Failing 0" in str(warning.message)]
    assert len(told) == 2
    assert (
        "Failing 0 failed in save at step 3: OSError: [Errno 28] No space left on device. Training goes on" in told[0]
    )
    assert "the logs of Failing 0 have a gap: it failed 6 times between steps 3 and 5" in told[1]
    assert toys.same(toys.snapshot(module), toys.snapshot(fit(tmp_path / "plain", False)))
    # The rows were kept, and written when there was room again.
    assert steps_of(logger) == list(range(8))


def test_lightning_alone_ends_with_its_logger(tmp_path: Path) -> None:
    """If this fails, Lightning handles it itself and `SteadyLoggers` can be removed."""
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, Failing(tmp_path, range(2, 5)))


def test_the_others_go_on_logging(tmp_path: Path) -> None:
    class Raising(Logger):
        @property
        def name(self) -> str:
            return "raising"

        @property
        def version(self) -> int:
            return 0

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("the server is gone")

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            raise RuntimeError("the server is gone")

        def finalize(self, status: str) -> None:
            raise RuntimeError("the server is gone")

    good, steady = CSVLogger(tmp_path), SteadyLoggers()
    with (
        pytest.warns(UserWarning, match="Raising 0 failed in log_metrics at step 1: RuntimeError: the server is gone"),
        pytest.warns(UserWarning, match="the logs of Raising 0 have a gap: it failed 8 times between steps 1 and 8"),
    ):
        fit(tmp_path, [Raising(), good], callbacks=[steady])
    assert steps_of(good) == list(range(8))
    assert steady.gaps.keys() == {"Raising 0"}


def test_a_logger_that_works_is_what_it_was(tmp_path: Path) -> None:
    logger, steady = CSVLogger(tmp_path), SteadyLoggers()
    fit(tmp_path, logger, callbacks=[steady])
    assert isinstance(logger, CSVLogger)
    assert type(logger).__name__ == "CSVLogger"
    assert steady.gaps == {}
    assert steps_of(logger) == list(range(8))
