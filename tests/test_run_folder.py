"""Files of a run lie beside its checkpoints, and no run overwrites those of another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from typing_extensions import override

from lightning_lora.batch.calibration import PROBE_FILE
from lightning_lora.callbacks import AdapterCheckpoint, BatchSizeMonitor, MergeOnFitEnd, RunLock
from lightning_lora.study.rank_probe_result import RANK_PROBE_FILE
from lightning_lora.trainer_access import RUN_FILES, run_folder
from tests.support import toys
from tests.support.toys import Toy

pytestmark = [*toys.expected_warnings, *toys.monitor_warnings]


class Remote(Logger):
    """A logger as that of a server: a name and a version for each run, and a folder for all runs or none."""

    def __init__(self, version: str | int | None = None, save_dir: str | None = None) -> None:
        super().__init__()
        self._version, self._save_dir = version, save_dir

    name = property(lambda self: "project")  # pyright: ignore
    version = property(lambda self: self._version)  # pyright: ignore
    save_dir = property(lambda self: self._save_dir)  # pyright: ignore

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


class HoldsLock(Callback):
    """Keeps the folder in which the lock of the run was."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (lock,) = Path(trainer.default_root_dir).rglob("*.lock")
        self.folder = lock.parent


def fit(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    callbacks = (RunLock(), AdapterCheckpoint(), MergeOnFitEnd(), BatchSizeMonitor(), *callbacks)
    runner = toys.trainer(folder, callbacks=list(callbacks), enable_checkpointing=True, **options)
    runner.fit(Toy(), toys.loader(), toys.loader(2))
    return runner


WRITTEN = {"adapters", "merged", "events.jsonl"}


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {"checkpoints", "version_1", "version_2"}


@pytest.mark.parametrize("save_dir", [None, "logs"])
def test_runs_of_a_logger_without_a_folder_of_its_own_write_beside_their_checkpoints(
    save_dir: str | None, tmp_path: Path
) -> None:
    above = tmp_path if save_dir is None else tmp_path / save_dir
    watch = HoldsLock()
    for version, name in (("abc", "abc"), (7, "version_7")):
        logger = Remote(version, None if save_dir is None else str(above))
        runner = fit(tmp_path, watch, logger=logger)
        folder = above / "project" / name
        assert Path(runner.checkpoint_callback.dirpath) == folder / "checkpoints"  # pyright: ignore
        assert names(folder) == WRITTEN
        # Two agents at the same time do not meet at one lock.
        assert watch.folder == folder
    assert names(above) == {"project"}


@pytest.mark.parametrize("logger", [False, Remote(), Remote("")])
def test_a_second_run_leaves_the_files_of_the_first(logger: Any, tmp_path: Path) -> None:
    runs = [fit(tmp_path, logger=logger)]
    folder = Path(run_folder(runs[0]))
    before = toys.tree(folder)
    runs += [fit(tmp_path, logger=logger), fit(tmp_path, logger=logger)]
    assert [Path(run_folder(run)) for run in runs] == [folder, folder / "version_1", folder / "version_2"]
    assert all(names(Path(run_folder(run))) == WRITTEN for run in runs)
    after = toys.tree(folder)
    assert {name: after[name] for name in before} == before


def test_a_second_fit_of_a_trainer_goes_on_in_its_folder(tmp_path: Path) -> None:
    runner = fit(tmp_path)
    runner.fit_loop.max_epochs = 2
    runner.fit(Toy(), toys.loader(), toys.loader(2))
    assert names(tmp_path) == WRITTEN
    assert not (tmp_path / "version_1").exists()


@pytest.mark.parametrize(("given", "expected"), [("mine", "mine"), ("mine/checkpoints", "mine")])
@pytest.mark.parametrize("logger", [False, Remote("abc")])
def test_a_folder_given_for_checkpoints_is_that_of_the_run(
    logger: Any, given: str, expected: str, tmp_path: Path
) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path / given), logger=logger)
    assert names(tmp_path / expected) >= WRITTEN
    assert names(tmp_path) == {"mine"}


def test_the_folder_of_a_csv_logger_is_that_of_the_run_wherever_checkpoints_are(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv", version=3)
    assert Path(run_folder(fit(tmp_path, ModelCheckpoint(tmp_path / "mine"), logger=logger))) == Path(logger.log_dir)


def test_every_file_of_a_run_tells_that_a_folder_is_taken(tmp_path: Path) -> None:
    page = (toys.ROOT / "docs" / "reference" / "run_files.md").read_text().partition("## A study folder")[0]
    # Lightning writes these, or only at a name that the user has given, or for as long as the run goes on.
    others = {"metrics.csv", "hparams.yaml", "checkpoints", "exported", "merge_certificate.json"}
    cells = [cell for cell in re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE) if ".lock" not in cell]
    listed = {name.partition("/")[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert {*WRITTEN, "config.yaml", PROBE_FILE, RANK_PROBE_FILE} <= set(RUN_FILES) == listed - others
    for number, name in enumerate(RUN_FILES):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).touch()
        assert run_folder(toys.trainer(folder)) == str(folder / "version_1")
