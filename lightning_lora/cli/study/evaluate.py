"""``lightning-lora evaluate``: benchmarks of the models of a study or run, by lm-eval in processes of its own."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.errors import BenchmarkError, RunSourceError

if TYPE_CHECKING:
    from lightning_lora.study.matched.record import StudyRecord
    from lightning_lora.study.tasks.benchmark import Model
    from lightning_lora.study.tasks.settings import TaskSettings

TUNED = "tuned model"


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``evaluate``."""
    parser.add_argument("folder", type=Path, help="a study folder, a run folder, or an adapter folder")
    parser.add_argument("--tasks", required=True, metavar="NAMES", help="tasks of lm-eval, with commas between")
    parser.add_argument("--limit", type=float, metavar="N", help="only N questions of each task; below 1: a share")
    parser.add_argument("--fewshot", type=int, metavar="N", help="worked examples before each (default: the task's)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions at once (default: 8)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--chat", action="store_true", help="put each question as a turn of a chat")
    parser.add_argument("--task-folder", metavar="DIR", help="a folder with YAML files of tasks of your own")
    parser.add_argument(
        "--band", type=float, default=0.01, metavar="SHARE", help="share of questions that counts as equal (0.01)"
    )
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run programs that the models write, without a sandbox: HumanEval, MBPP",
    )


def evaluate(arguments: Namespace) -> None:
    """Evaluate and compare, and write the report again.

    Raises:
        ConfigError: If a setting is wrong, lm-eval is absent, or an arm has kept no model.
        DataError: If there is nothing to evaluate, or lm-eval fails.
    """
    from lightning_lora.study.matched.record import STUDY, read_study
    from lightning_lora.study.tasks.lm_eval_run import check_installed

    settings = _settings(arguments)
    check_installed()
    folder: Path = arguments.folder
    if (folder / STUDY).is_file():
        _of_study(read_study(folder), settings)
    else:
        _of_run(folder, settings)


def _settings(arguments: Namespace) -> TaskSettings:
    from lightning_lora.study.tasks.settings import TaskSettings

    return TaskSettings(
        tuple(name.strip() for name in arguments.tasks.split(",") if name.strip()),
        arguments.limit,
        arguments.fewshot,
        arguments.batch_size,
        arguments.device,
        arguments.chat,
        arguments.task_folder,
        arguments.allow_code_execution,
        arguments.band,
    )


def _of_study(study: StudyRecord, settings: TaskSettings) -> None:
    from lightning_lora.study.matched.record import UNTRAINED
    from lightning_lora.study.tasks.benchmark import Model, benchmark
    from lightning_lora.study.tasks.record import NO_SEED

    models = list(_models(study))
    seeds = sorted({model.seed for model in models})
    base = _base_of(study)
    models = [*([Model(UNTRAINED, NO_SEED, base)] if base else []), *models]
    found = benchmark(study.folder, models, settings, _write_merged, study.baseline, study.primary, seeds, _tell)
    for verdict in found:
        _tell(verdict.sentence)
    _report(study.folder)


def _models(study: StudyRecord) -> Iterator[Model]:
    """The models of the verdict runs.

    Raises:
        ConfigError: If a run has kept none, or none is done.
    """
    from lightning_lora.study.tasks.benchmark import Model
    from lightning_lora.study.tasks.kept_models import kept_model

    done = [cell for cell in study.cells if cell.phase == "verdict" and cell.state == "done"]
    if not done:
        raise BenchmarkError(f"no verdict run of {study.folder} is done yet: finish the study first.")
    missing = sorted({cell.arm for cell in done if kept_model(study.run_folder(cell)) is None})
    if missing:
        raise BenchmarkError(
            f"the runs of {', '.join(missing)} have kept no model: whole models are kept by study --keep-models, given "
            f"from the start. Run the study with it in a new --out."
        )
    for cell in done:
        yield Model(cell.arm, cell.seed, str(kept_model(study.run_folder(cell))))


def _base_of(study: StudyRecord) -> str | None:
    """The base that the baseline was trained from, a folder or a hub name."""
    config: Any = next(arm.config for arm in study.arms if arm.name == study.baseline)
    for name in ("model", "init_args", "model"):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config if isinstance(config, str) else None


def _of_run(folder: Path, settings: TaskSettings) -> None:
    from lightning_lora.cli.run_source import find_source
    from lightning_lora.files.adapter.folder import read_adapter_folder
    from lightning_lora.study.matched.record import UNTRAINED
    from lightning_lora.study.report.runs.run_record import is_run
    from lightning_lora.study.tasks.benchmark import Model, benchmark

    source = find_source(folder)
    if source.is_file():  # a checkpoint at the same step as the adapter says no more than it
        adapter = folder / "adapters" / "last"
        if not adapter.is_dir():
            raise RunSourceError(f"{folder} has no adapter folder: lightning-lora export {source} OUT writes one.")
        source = adapter
    base = read_adapter_folder(source).peft.get("base_model_name_or_path")
    models = [*([Model(UNTRAINED, 0, base)] if base else []), Model(TUNED, 0, str(source))]
    for verdict in benchmark(folder, models, settings, _write_merged, UNTRAINED, TUNED, [0], _tell):
        _tell(verdict.sentence)
    if is_run(folder):
        _report(folder)


def _write_merged(adapter: Path, out: Path) -> None:
    from lightning_lora.cli.export import export

    export(adapter, out, "merged")


def _report(folder: Path) -> None:
    from lightning_lora.study.report.write import report_files, write_report

    _tell(f"report: {report_files(write_report(folder)[0])}")


def _tell(line: str) -> None:
    print(line, flush=True)
