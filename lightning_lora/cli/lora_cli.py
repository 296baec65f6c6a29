"""LightningCLI with LoRA's defaults: ``fit``, ``validate``, ``test``, ``predict``, ``probe``, ``preview``, ``plan``."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_lora.allowed_imports import allow
from lightning_lora.callbacks import (
    AdapterCheckpoint,
    CheckpointGuard,
    FiniteGradients,
    GracefulStop,
    LoRA,
    LoRAGuard,
    LoRAProgressBar,
    MemoryAdvice,
    MemoryChoice,
    RankWatch,
    RunLock,
    SteadyLoggers,
    TargetBatchSize,
)
from lightning_lora.checkpoints.fallback import choose_checkpoint
from lightning_lora.cli.ending.end_of_run import EndOfRun
from lightning_lora.cli.mistakes.config_files import check_config_files
from lightning_lora.cli.mistakes.running import check_ckpt_path, check_data, check_trainer, trainer_error
from lightning_lora.cli.parser import LoRAArgumentParser, restrict_imports
from lightning_lora.cli.preview import expand_arguments
from lightning_lora.cli.probe import AT, ProbingTrainer, choose_probe, prepare_probe
from lightning_lora.cli.quiet import quiet_libraries, tell_infos
from lightning_lora.cli.run_config import RunConfig
from lightning_lora.errors import CommandError, ConfigError
from lightning_lora.files.lightning_checkpoint import unsafe_checkpoint
from lightning_lora.study.batch_probe import BatchProbe
from lightning_lora.study.rank_probe import RankProbe
from lightning_lora.trainer_access import found

RUNS = "runs"
"""The folder for loggers whose ``save_dir`` is empty, without a ``default_root_dir``."""
# RunLock comes first: nothing may be written in a folder where another run writes.
DEFAULTS = (
    RunLock,
    RankWatch,
    GracefulStop,
    FiniteGradients,
    MemoryChoice,
    MemoryAdvice,
    LoRAGuard,
    CheckpointGuard,
    AdapterCheckpoint,
    SteadyLoggers,
    EndOfRun,
)
# A probe leaves nothing behind that a run could go on from.
PROBE_DEFAULTS = (RunLock, FiniteGradients, MemoryAdvice, LoRAGuard)
# These train nothing.
PREVIEWS = ("preview", "plan")
PREVIEW_TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class LoRACLI(LightningCLI):
    """A LightningCLI for modules with LoRA, and what `lightning-lora fit` runs.

    In a script of your own: ``from lightning_lora.cli import LoRACLI`` and ``LoRACLI(MyModule, MyData)``. Arguments are
    those of LightningCLI; a model or data class that is not given is chosen by class path in the config. The optimizer
    is the module's own: the one LightningCLI would build sees the parameters before the adapters exist, and trains
    nothing. The callbacks of `DEFAULTS` and `LoRAProgressBar` are added unless the config brings its own. A logger with
    an empty ``save_dir`` writes in ``trainer.default_root_dir``, or in ``runs`` without one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        quiet_libraries()
        given = kwargs.get("args") or sys.argv[1:]
        self._asked = given[0] if given and isinstance(given, list) else None
        self.config_planned: Any = None
        self._filled: list[Any] = []
        kwargs.setdefault("seed_everything_default", 0)
        kwargs.setdefault("parser_class", LoRAArgumentParser)
        kwargs.setdefault("trainer_class", ProbingTrainer)
        kwargs.setdefault("save_config_callback", RunConfig)
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        kwargs.setdefault("parser_kwargs", {name: {"epilog": _example(name)} for name in self.subcommands()})
        super().__init__(*args, auto_configure_optimizers=False, **kwargs)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands, and ``probe``, ``preview`` and ``plan``, which take the arguments of ``fit``."""
        subcommands, given = LightningCLI.subcommands(), {"model", "datamodule"}
        return subcommands | {"probe": subcommands["fit"], "preview": given, "plan": given}

    def before_fit(self) -> None:
        """Lock the run folder before the logger is used: a CSV logger deletes the metrics that it finds."""
        check_data(self.model, self.datamodule)
        check_trainer(self.trainer, self._get(self.config, "trainer"))
        if end := found(self.trainer, EndOfRun):
            end.keep_metrics(self.trainer)
        # The folder of another logger may be known only when it has begun, and then the callback itself is in time.
        if isinstance(self.trainer.logger, CSVLogger) and (lock := found(self.trainer, RunLock)):
            lock.acquire(self.trainer)

    def after_fit(self) -> None:
        """Unlock the run folder if child processes have trained: no callback ends in this process then."""
        if lock := found(self.trainer, RunLock):
            lock.teardown(self.trainer, self.model, "fit")

    before_probe = before_fit

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Check the config files before they are parsed."""
        arguments = sys.argv[1:] if args is None else args
        if isinstance(arguments, list):
            try:
                check_config_files(arguments)
            except ConfigError as error:
                refuse = getattr(parser, "refuse", parser.error)  # a parser of the user's choice has no such method
                refuse(str(error))
            for each in (parser, *getattr(self, "_subcommand_parsers", {}).values()):
                each.given = arguments  # pyright: ignore[reportAttributeAccessIssue]
        super().parse_arguments(parser, args)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings that belong to no class of the config."""
        parser.add_argument(
            "--allow_other_base",
            type=bool,
            default=False,
            help="Load a checkpoint even if its adapter was trained on other base weights.",
        )
        parser.add_argument(
            "--target_batch_size",
            type=int | None,
            default=None,
            help="Rows per optimizer step on all devices: sets the accumulation, and lowers batch_size if it must.",
        )

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._asked in self.subcommands() and subcommand != self._asked:
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)  # the arguments of a command that does not run need not be known
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "probe":
            parser.add_argument(
                "--rank", action="store_true", help="Try twice the rank (settings: rank_probe), not other batch sizes."
            )
            parser.add_lightning_class_args(BatchProbe, "batch_probe")
            parser.add_lightning_class_args(RankProbe, "rank_probe")
            parser.set_defaults({"batch_probe.at": AT, "batch_probe.stop": True, "rank_probe.stop": True})
        return parser

    @override
    def instantiate_classes(self) -> None:
        """Pass ``allow_other_base`` on to the module and the callback that load adapters."""
        super().instantiate_classes()
        if self._get(self.config_init, "allow_other_base"):
            self.model.lora_allow_other_base = True  # pyright: ignore[reportAttributeAccessIssue]
            if lora := found(self.trainer, LoRA):
                lora.allow_other_base = True

    @override
    def before_instantiate_classes(self) -> None:
        """Give loggers their folder, and leave out what ``preview`` does not need."""
        if self.subcommand == "plan":
            self.config_planned = self.config["plan"].clone()
        root = self._get(self.config, "trainer.default_root_dir") or RUNS
        for logger in self._loggers_without_folder():
            logger["init_args"]["save_dir"] = str(root)
            self._filled.append(logger)
        if self.subcommand not in PREVIEWS:
            return
        tell_infos(False)
        settings: Any = self.config[self.subcommand]
        for name in ("logger", "callbacks", "plugins", "profiler"):
            settings["trainer"][name] = False if name == "logger" else None
        model = settings["model"]
        if self.subcommand == "preview" and str(model.get("class_path")).startswith("lightning_lora."):
            # Building a model to check the LoRA settings on would take longer than all else.
            model["init_args"]["lora"] = model["init_args"]["quantization"] = None

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        while self._filled:  # the config that is saved beside the run can be moved again
            self._filled.pop()["init_args"]["save_dir"] = ""
        defaults = DEFAULTS
        if self.subcommand in PREVIEWS:
            return self.trainer_class(**PREVIEW_TRAINER)
        if self.subcommand == "probe":
            prepare_probe(config, choose_probe(callbacks, self._get(self.config_init, "rank")))
            self.save_config_callback, defaults = None, PROBE_DEFAULTS
        own = config.get("callbacks") or []
        own = own if isinstance(own, list) else [own]
        progress = () if config.get("enable_progress_bar") is False else ((LoRAProgressBar, ProgressBar),)
        for default, kind in (*((default, default) for default in defaults), *progress):
            if not any(isinstance(callback, kind) for callback in own):
                callbacks.append(default())
        if (rows := self._get(self.config_init, "target_batch_size")) is not None:
            if any(isinstance(callback, TargetBatchSize) for callback in own):
                raise CommandError("target_batch_size and a TargetBatchSize callback are the same: give one of the two")
            callbacks.append(TargetBatchSize(rows))
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise trainer_error(error, config) from error

    def _loggers_without_folder(self) -> list[Any]:
        """The loggers of the config whose ``save_dir`` is empty."""
        given = self._get(self.config, "trainer.logger")
        loggers = given if isinstance(given, list) else [given]
        return [
            logger
            for logger in loggers
            if isinstance(logger, Namespace) and logger.get("init_args", Namespace()).get("save_dir") == ""
        ]

    @override
    def _parse_ckpt_path(self) -> None:
        """Verify a checkpoint before its settings are read; ``fit`` may take the whole one beside a damaged one."""
        subcommand = self.config.get("subcommand")
        settings: Any = self.config[subcommand] if subcommand else {}
        path = settings.get("ckpt_path")
        if path:
            check_ckpt_path(path, is_fit=subcommand in ("fit", "probe"))
        if path and Path(path).is_file():
            whole = choose_checkpoint(Path(path), fall_back=subcommand in ("fit", "probe")).path
            if not os.path.samefile(whole, path):
                settings["ckpt_path"] = str(whole)
        try:
            super()._parse_ckpt_path()
        except pickle.UnpicklingError as error:
            raise unsafe_checkpoint(settings["ckpt_path"], error) from error


def _example(subcommand: str) -> str:
    if subcommand == "preview":
        return "example: lightning-lora preview rows.jsonl --model FOLDER (or the arguments of fit)"
    return f"example: lightning-lora {subcommand} --config cli_configs/sft.yaml --config cli_configs/lora.yaml"


def run_trainer_command(arguments: list[str], allowed: Sequence[str]) -> LoRACLI:
    """Run ``fit`` or another command of `LoRACLI`, and return it.

    Args:
        arguments: The command and what follows it.
        allowed: Prefixes of class paths that a config may name beside `ALLOWED_PREFIXES`.
    """
    allow(allowed)
    restrict_imports()
    if arguments[0] == "preview":
        arguments = ["preview", *expand_arguments(arguments[1:])]
    sys.argv[1:] = arguments  # LightningCLI warns about arguments from elsewhere
    try:
        tell_infos(arguments[0] not in PREVIEWS)
        cli = LoRACLI()
    finally:
        tell_infos(True)
    if torch.distributed.is_initialized():
        # Threads of gloo that are left at exit may abort a process whose work is done.
        torch.distributed.destroy_process_group()
    return cli
