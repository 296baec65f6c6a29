"""`Study`: matched runs of any LightningModule, from Python."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_lora.callbacks import AdapterCheckpoint, CheckpointGuard, FiniteGradients, GracefulStop, RunLock
from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.errors import StudySettingError, check_arguments
from lightning_lora.lightning_messages import messages_from
from lightning_lora.study.bank.bank import Arm, Mode
from lightning_lora.study.bank.exactness import TRAINS_BASE, ApartError
from lightning_lora.study.bank.groups import Job, run_group, side_by_side
from lightning_lora.study.bank.process_state import seed_all
from lightning_lora.study.matched.cells import Cell, Outcome
from lightning_lora.study.matched.checks.built import build_arm
from lightning_lora.study.matched.checks.equal import check_equal
from lightning_lora.study.matched.open_study import open_study
from lightning_lora.study.matched.options import ARM_PARTS, config_of
from lightning_lora.study.matched.progress import promises
from lightning_lora.study.matched.record import UNTRAINED, StudyRecord, read_study
from lightning_lora.study.matched.recorder import CellRecorder
from lightning_lora.study.matched.run_cell import (
    EVERY,
    as_run_error,
    cell_callbacks,
    drop_foreign_locks,
    fit_and_score,
    remove_checkpoints,
    share_of_run,
)
from lightning_lora.study.matched.spec import spec_of
from lightning_lora.study.matched.worker import LeaseLostError, Worker
from lightning_lora.study.statistics.rates.sweep import first_rates
from lightning_lora.study.statistics.word import BAND

_TRAINER: dict[str, Any] = {
    "max_epochs": 1,
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Study:
    """Trains one module in several ways on the same data, and says which of them match the baseline.

    Each arm gets the learning rate that is best for it, found on a seed and on held-out rows that the verdict does not
    use; the sweep widens until its best rate has a worse one on either side. Then every arm is trained with the same
    fresh seeds and compared with the baseline, row by row of the held-out data. Runs are kept in the folder ``out``: a
    second call of `run` continues with those that are not finished, and several processes may call it at once.

    A module scores single rows if its ``predict_step`` returns a mapping with the mean ``loss`` of each row ``(rows,)``
    and, where rows have several, their ``tokens``; otherwise by what its ``validation_step`` logs as ``val_loss``.

    Args:
        module: Makes the module: called with ``learning_rate`` and the settings of the arm.
        data: Makes the data module: called with ``seed`` if it takes one, and with the settings under ``data`` of the
            arm. The held-out rows must not depend on the seed. None if the module has loaders itself.
        arms: Name of the arm to arguments of ``module``. Two of them are not passed on: ``trainer`` has options of the
            Trainer for this arm, ``data`` arguments of ``data``.
        learning_rates: Rates that each sweep starts with, or one rate, which stands for a third of it, itself and three
            times it; or a mapping from arms to either.
        baseline: The arm that others are compared with; the first one if not given.
        primary: The arm of the comparison that matters most, whose level is not corrected for the number of
            comparisons; the last one if not given.
        seeds: Number of fresh seeds for the verdict, a list of them, or ``"auto"`` for 3, 5 and 8 as needed.
        selection_seeds: Seeds that learning rates are chosen with.
        band: Nats that count as equal.
        evaluations: ``"log"`` evaluates the held-out rows on a grid of steps, each at most 1.1 times the one before,
            for curves and steps to a loss; a number is another factor. It needs losses of rows by ``predict_step``, and
            changes nothing of the training. None: the validations of the Trainer are the evaluations.
        aa: Whether the baseline is run again with other seeds, to see how much it differs from itself.
        halving: Whether selection runs that are far behind after a third of their steps are given up.
        batch_penalty: Asks whether the large batch costs the arms under ``lora`` more than those under ``full``:
            ``{"lora": {"small": ARM, "large": ARM}, "full": {"small": ARM, "large": ARM}}``.
        name: Its name, which tells it from other studies in one database; None: the name of the folder.
        out: The study folder.
        storage: ``postgresql://USER@HOST/NAME`` for several machines; None for a SQLite file in ``out``.
        trainer: Options of the Trainer of every run.
        checkpoint_minutes: Time between two checkpoints of a run, which is what a kill costs at most.
        arms_per_device: Number of adapter runs that train side by side on one base in this process; see `ArmBank`.
        arms_mode: ``"turns"``, as separate runs bit for bit, or ``"rows"``, in the same batches, equal up to rounding.
            ``"auto"`` takes turns and says why.

    Raises:
        ConfigError: If a setting is wrong, arms differ in what must be equal, or ``out`` belongs to something else.

    Example::

        study = Study(
            MyModule, MyData, {"full": {"lora": None}, "rank 8": {"lora": LoRAConfig(rank=8)}}, learning_rates=1e-4
        )
        print(study.run().verdicts[0]["sentence"])
    """

    def __init__(
        self,
        module: Callable[..., LightningModule],
        data: Callable[..., LightningDataModule] | None,
        arms: Mapping[str, Mapping[str, Any]],
        learning_rates: float | Sequence[float] | Mapping[str, float | Sequence[float]],
        *,
        baseline: str | None = None,
        primary: str | None = None,
        seeds: int | Sequence[int] | Literal["auto"] = 3,
        selection_seeds: Sequence[int] = (0,),
        band: float = BAND,
        evaluations: float | Literal["log"] | None = None,
        aa: bool = False,
        halving: bool = False,
        batch_penalty: Mapping[str, Mapping[str, str]] | None = None,
        name: str | None = None,
        out: str | Path = "study",
        storage: str | None = None,
        trainer: Mapping[str, Any] | None = None,
        checkpoint_minutes: float = EVERY.total_seconds() / 60,
        arms_per_device: int = 1,
        arms_mode: Mode | Literal["auto"] = "auto",
    ) -> None:
        check_arguments(Study, locals(), StudySettingError)
        self.module = module
        self.data = data
        self.arms = {name: dict(settings) for name, settings in arms.items()}
        self.folder = Path(out)
        self.storage = storage
        self.trainer = dict(trainer or {})
        self.every = timedelta(minutes=checkpoint_minutes)
        given: dict[str, Any] = {
            "seeds": list(seeds) if isinstance(seeds, Sequence) and not isinstance(seeds, str) else seeds,
            "selection_seeds": list(selection_seeds),
            "band": band,
            "evaluations": evaluations,
            "aa": aa,
            "halving": halving,
            "batch_penalty": batch_penalty,
            "arms_per_device": arms_per_device,
            "arms_mode": arms_mode,
            "arms": {name: {"learning_rates": self._rates(learning_rates, name)} for name in self.arms},
        }
        given |= {key: name for key, name in (("baseline", baseline), ("primary", primary)) if name is not None}
        spec, _, _ = spec_of(given, name or self.folder.absolute().name)
        self.spec = spec.with_configs(
            {
                name: config_of(f"arm {name!r}", module, data, arm, _TRAINER | self.trainer)
                for name, arm in self.arms.items()
            }
        )
        check_equal(self.spec.arms)

    def run(self, retry_failed: bool = False) -> StudyRecord:
        """Do all runs that are not finished, and return what is found.

        Args:
            retry_failed: Whether runs that failed before are tried again.

        Raises:
            ConfigError: If the folder or the database belong to another study, or the module of an arm cannot be made
                and adapted.
        """
        reasons = []
        for name in self.arms:
            built = build_arm(name, partial(self._module, name), self._options(name).get("callbacks"))
            reasons.append("" if built is None else built.why_no_rows)
        self.spec = self.spec.with_mode(reasons, tokens=None, is_cpu=not torch.cuda.is_available())
        store = open_study(self.spec, {}, self.folder, self.storage)
        try:
            for line in promises(self.spec):
                print(line)
            if retry_failed:
                print(f"{store.retry_failed()} failed runs are tried again")
            group = side_by_side(self.spec, self._why_apart(), self._run_group)
            for line in group.announcement() if group else ():
                print(line)
            Worker(self.spec, {}, self.folder, store, self._run_cell, side_by_side=group).work()
        finally:
            store.close()
        return self.results()

    def results(self) -> StudyRecord:
        """What is in the study folder now, finished or not.

        Raises:
            DataError: If the study has not begun.
        """
        return read_study(self.folder)

    def report(self, path: str | Path | None = None) -> Path:
        """Write ``report.html``, ``report.md`` and ``report.csv`` of what is found so far.

        Args:
            path: The folder to write into. None: the study folder.

        Returns:
            The page, which opens in any browser.

        Raises:
            DataError: If the study has not begun.
        """
        from lightning_lora.study.report.write import HTML, write_report  # templates, which a study runs without

        return write_report(self.folder, out=path)[0] / HTML

    @staticmethod
    def _rates(given: Any, arm: str) -> list[float]:
        if isinstance(given, Mapping):
            if arm not in given:
                raise StudySettingError(f"learning_rates has no rate for the arm {arm!r}: it has {list(given)}.")
            given = given[arm]
        return list(given) if isinstance(given, Sequence) else list(first_rates(given))

    def _why_apart(self) -> dict[str, str]:
        return {name: TRAINS_BASE for name, arm in self.arms.items() if "lora" in arm and arm["lora"] is None}

    def _run_group(self, jobs: Sequence[Job]) -> tuple[Sequence[Outcome | BaseException], Sequence[str]]:
        with messages_from(logging.WARNING):  # here, as each run would put back what another one has set
            return run_group(jobs, self.spec.arms_mode, self._run_cell)

    def _run_cell(self, cell: Cell, folder: Path, lost: threading.Event, place: Arm | None = None) -> Outcome:
        name = self.spec.baseline if cell.arm == UNTRAINED else cell.arm
        drop_foreign_locks(folder)
        try:
            with kept_random_state(torch.device("cpu")), nullcontext() if place else messages_from(logging.WARNING):
                seed_all(cell.seed)
                module = self._module(name, cell.learning_rate)
                trainer = self._trainer(cell, folder, lost, self._options(name), place)
                data = self._data(cell.seed, dict(self.arms[name].get("data", {})))
                outcome = fit_and_score(trainer, module, data, folder, cell.phase)
        except (LeaseLostError, ApartError):
            raise
        except Exception as error:
            raise as_run_error(error) from error
        remove_checkpoints(folder, cell.phase)
        return outcome

    def _module(self, arm: str, rate: float = 0.0) -> LightningModule:
        settings = {name: value for name, value in self.arms[arm].items() if name not in ARM_PARTS}
        # The base is not trained, so any rate does; zero is refused by some modules.
        return self.module(learning_rate=rate or self.spec.arm(arm).learning_rates[0], **settings)

    def _options(self, arm: str) -> dict[str, Any]:
        """Options of the Trainer of an arm."""
        return _TRAINER | self.trainer | dict(self.arms[arm].get("trainer", {}))

    def _trainer(
        self, cell: Cell, folder: Path, lost: threading.Event, options: dict[str, Any], place: Arm | None
    ) -> Trainer:
        own = copy.deepcopy(options.pop("callbacks", None) or [])
        own = own if isinstance(own, list) else [own]
        guards = [RunLock(), FiniteGradients(), CheckpointGuard(), AdapterCheckpoint(), GracefulStop()]
        clock = time.perf_counter if place is None else place.seconds
        recorder = CellRecorder(folder, cell.seed, lost, self.spec.evaluations, share_of_run(cell.phase), clock)
        callbacks = [*own, *guards, *cell_callbacks(folder, recorder, self.every), *([place.callback] if place else [])]
        return Trainer(**(options | {"default_root_dir": folder, "callbacks": callbacks}))

    def _data(self, seed: int, arguments: Mapping[str, Any]) -> LightningDataModule | None:
        if self.data is None:
            return None
        takes_seed = "seed" in inspect.signature(self.data).parameters
        return self.data(**arguments, **({"seed": seed} if takes_seed else {}))
