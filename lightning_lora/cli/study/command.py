"""``lightning-lora study``: begins a study, or joins it, and works until nothing is left."""

from __future__ import annotations

import math
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING

from lightning_lora.allowed_imports import allow
from lightning_lora.cli.help.command import CommandParser
from lightning_lora.errors import StudySettingError
from lightning_lora.this_command import this_command

if TYPE_CHECKING:
    from lightning_lora.cli.study.estimate import Estimate
    from lightning_lora.study.matched.spec import StudySpec
    from lightning_lora.study.matched.worker import Worker

EXAMPLE = "example: lightning-lora study studies/ranks.yaml --out runs/ranks"
RUNS, RETRY = "runs", "--retry-failed"
DEFAULT_OUT = Path(RUNS, "full_against_lora")
FAILED = 3
"""Exit code of a finished study in which runs failed."""


def run_study(arguments: Sequence[str], allowed: Sequence[str]) -> None:
    """Run a study; exits with code 3 if runs failed.

    Args:
        arguments: What follows ``study`` on the command line.
        allowed: Prefixes of class paths that a config may name beside those of known packages.

    Raises:
        ConfigError: If the study file, a config, the folder or the storage cannot be used.
    """
    options, rest = _parsed(list(arguments))
    if options.file is None and not rest:
        raise StudySettingError(
            f"study needs a study file, or --config FILE of a run to try in full and by adapters. {EXAMPLE}"
        )
    if options.file is not None and rest:
        raise StudySettingError(
            f"study {options.file} takes no {rest[0]!r}: options of fit go under overrides in the file."
        )
    if options.hours is not None and not 0 < options.hours < math.inf:
        raise StudySettingError(f"--hours must be a positive number, got {options.hours:g}.")
    if options.file is not None and options.hours is not None:
        raise StudySettingError(
            f"--hours shortens the runs of a study without a file; in {options.file} set trainer.max_steps under "
            f"overrides, and the start says how long that takes."
        )
    from lightning_lora.cli.parser import restrict_imports
    from lightning_lora.study.matched.spec import read_spec
    from lightning_lora.study.tasks.settings import KEEP_VARIABLE

    allow(allowed)
    if options.keep_models:
        os.environ[KEEP_VARIABLE] = "1"
    given = read_spec(options.file) if options.file is not None else None  # a mistake in it is told before slow imports
    restrict_imports()
    from lightning_lora.cli.quiet import tell_infos
    from lightning_lora.cli.study.arms import resolve
    from lightning_lora.cli.study.default_study import default_study
    from lightning_lora.cli.study.devices import start_workers, visible_devices

    tell_infos(False)
    if given is not None:
        spec, estimated = resolve(*given, Path(str(options.file)).parent), None
    else:
        spec, estimated = default_study(rest, options.hours, Path(options.out) if options.out else DEFAULT_OUT)
    again = [word for word in arguments if word != RETRY]
    _work(options, spec, estimated, lambda: start_workers(visible_devices(), again, allowed))


def _work(
    options: Namespace,
    spec: StudySpec,
    estimated: Estimate | None,
    start_others: Callable[[], list[Popen[bytes]]],
) -> None:
    from lightning_lora.cli.study.processes import ProcessCells
    from lightning_lora.cli.study.summary import after_end
    from lightning_lora.study.matched.open_study import data_fingerprints, open_study
    from lightning_lora.study.matched.worker import Worker

    data = data_fingerprints(spec.arms[0].config.get("data"))
    folder = Path(options.out) if options.out else Path(RUNS, spec.name)
    store = open_study(spec, data, folder, options.storage)
    others: list[Popen[bytes]] = []
    try:
        if options.retry_failed:
            print(f"{store.retry_failed()} failed runs are tried again")
        cells = ProcessCells(spec)
        group = cells.side_by_side()
        worker = Worker(spec, data, folder, store, cells, partial(print, flush=True), group)
        signal.signal(signal.SIGTERM, _stop)
        if not options.worker:
            _tell_start(worker, folder, estimated)
            for line in group.announcement() if group else ():
                print(line, flush=True)
            others = start_others()
        plan = worker.work()
        _, statuses = worker.plan()
    except (KeyboardInterrupt, SystemExit):
        print(f"stopped; to go on with the runs that are not finished, type:\n  {this_command()}", file=sys.stderr)
        for other in others:
            other.terminate()
        raise
    finally:
        for other in others:
            other.wait()
        store.close()
    for line in after_end(plan, statuses, folder):
        print(line, flush=True)
    from lightning_lora.study.report.write import report_files, write_report

    print(f"report: {report_files(write_report(folder)[0])}")
    if any(status.state == "failed" for status in statuses):
        raise SystemExit(FAILED)


def _tell_start(worker: Worker, folder: Path, estimated: Estimate | None) -> None:
    from lightning_lora.cli.study.estimate import estimate
    from lightning_lora.cli.study.summary import before_begin

    first, statuses = worker.plan()
    over = sum(status.is_over for status in statuses)
    estimated = None if over else estimated or estimate(worker.spec)
    for line in before_begin(worker.spec, first.expected, over, folder, estimated):
        print(line, flush=True)


def _stop(signum: int, frame: object) -> None:
    """Answer SIGTERM as Ctrl-C is answered: the run that is being done saves its state, and is given back."""
    raise SystemExit(128 + signum)


def option_parser() -> CommandParser:
    """The parser of the options of ``study`` itself; the study file and options of ``fit`` are left over."""
    parser = CommandParser(
        "lightning-lora study",
        usage="lightning-lora study (FILE.yaml | --config FILE ... [options of fit]) [options]",
        description="Train the same data in several ways, each at its own best learning rate and with several seeds, "
        "and say which of them match the baseline. Everything may be killed and started again.",
        epilog=f"{EXAMPLE}. Without a file: full fine-tuning against two ranks.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", metavar="DIR", help="the study folder (default: runs/NAME of the study)")
    parser.add_argument("--worker", action="store_true", help="join as one more worker: says nothing of the plan")
    parser.add_argument("--storage", metavar="URL", help="postgresql://USER@HOST/NAME (default: a SQLite file in DIR)")
    parser.add_argument(
        "--hours", type=float, metavar="N", help="without a file: shorten the runs to take so long in all"
    )
    parser.add_argument(
        "--keep-models", action="store_true", help="keep whole trained models of runs without adapters, for evaluate"
    )
    parser.add_argument(RETRY, action="store_true", help="try runs again that failed before")
    return parser


def _parsed(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """The options of ``study`` itself with the study file, and the arguments of ``fit``."""
    options, rest = option_parser().parse_known_args(arguments)
    options.file = rest.pop(0) if rest and not rest[0].startswith("-") else None
    return options, rest
