"""The command line: LightningCLI with LoRA's defaults, and the commands beside it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_lora.callbacks import (
    AdapterCheckpoint,
    CheckpointGuard,
    FiniteGradients,
    GracefulStop,
    LoRA,
    LoRAGuard,
    LoRAProgressBar,
    MemoryAdvice,
    RankWatch,
    RunLock,
    SteadyLoggers,
    TargetBatchSize,
)
from lightning_lora.checkpoints.fallback import choose_checkpoint
from lightning_lora.cli.commands import COMMANDS, run_command
from lightning_lora.cli.parser import LoRAArgumentParser
from lightning_lora.cli.probe import AT, ProbingTrainer, probing
from lightning_lora.cli.quiet import quiet_libraries
from lightning_lora.errors import ConfigError, GradientError, GuardError, closest, user_error
from lightning_lora.study.batch_probe import BatchProbe
from lightning_lora.trainer_access import found

# What a config may name: a class path imports and calls whatever it points at.
ALLOWED_PREFIXES = ("lightning_lora", "lightning", "torch", "torchmetrics", "transformers")
ALLOW_VARIABLE = "LIGHTNING_LORA_ALLOW"
# RunLock comes first: nothing may be written in a folder where another run writes.
DEFAULTS = (
    RunLock,
    RankWatch,
    GracefulStop,
    FiniteGradients,
    MemoryAdvice,
    LoRAGuard,
    CheckpointGuard,
    AdapterCheckpoint,
    SteadyLoggers,
)
# Of a run that leaves nothing behind to go on from.
PROBE_DEFAULTS = (RunLock, FiniteGradients, MemoryAdvice, LoRAGuard)
USAGE = """\
usage: lightning-lora [--allow PREFIX] COMMAND ...

LoRA without regret for any LightningModule.

  fit, validate, test, predict   run a model: lightning-lora fit --config cli_configs/sft.yaml
  probe     train for a while, then find the largest batch that does no harm
  demo      the main job on the embedded model and data, offline, on CPU
  merge     fold an adapter into a base checkpoint
  export    from a run to a PEFT folder or a merged model
  inspect   what an adapter or checkpoint is

  --allow PREFIX   let configs name classes of your own package (repeatable)

Every command explains itself with --help.
Exit codes: 0 done, 2 bad input, 130 and 143 stopped by a signal, 1 otherwise.
"""


class LoRACLI(LightningCLI):
    """A LightningCLI for modules with LoRA.

    Model and data are chosen by class path or, if given here, fixed. The optimizer is the module's own: the one
    LightningCLI would build sees the parameters before the adapters exist, and trains nothing. `DEFAULTS` and
    `LoRAProgressBar` are added unless the config brings its own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("seed_everything_default", 0)
        kwargs.setdefault("parser_class", LoRAArgumentParser)
        kwargs.setdefault("trainer_class", ProbingTrainer)
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        kwargs.setdefault("parser_kwargs", {name: {"epilog": _example(name)} for name in self.subcommands()})
        super().__init__(*args, auto_configure_optimizers=False, **kwargs)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ``probe``, which takes what ``fit`` takes."""
        subcommands = LightningCLI.subcommands()
        return subcommands | {"probe": subcommands["fit"]}

    def before_fit(self) -> None:
        """Lock the run folder before loggers are made: a CSV logger deletes the metrics that it finds."""
        if lock := found(self.trainer, RunLock):
            lock.acquire(self.trainer)

    def before_probe(self) -> None:
        """Lock the folder of the probe."""
        self.before_fit()

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings that belong to no class of the config."""
        parser.add_argument(
            "--allow_other_base",
            type=bool,
            default=False,
            help="Load a checkpoint though its adapter was trained on other base weights.",
        )
        parser.add_argument(
            "--target_batch_size",
            type=int | None,
            default=None,
            help="Rows per optimizer step on all devices; accumulation follows. batch_size is lowered if it must be.",
        )

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "probe":
            parser.add_lightning_class_args(BatchProbe, "batch_probe")
            parser.set_defaults({"batch_probe.at": AT, "batch_probe.stop": True})
        return parser

    @override
    def instantiate_classes(self) -> None:
        """Pass the setting on to whoever loads adapters."""
        super().instantiate_classes()
        if self._get(self.config_init, "allow_other_base"):
            self.model.lora_allow_other_base = True  # pyright: ignore[reportAttributeAccessIssue]
            if lora := found(self.trainer, LoRA):
                lora.allow_other_base = True

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        defaults = DEFAULTS
        if self.subcommand == "probe":
            probing(config)
            self.save_config_callback, defaults = None, PROBE_DEFAULTS
        own = config.get("callbacks") or []
        own = own if isinstance(own, list) else [own]
        progress = () if config.get("enable_progress_bar") is False else ((LoRAProgressBar, ProgressBar),)
        for default, kind in (*((default, default) for default in defaults), *progress):
            if not any(isinstance(callback, kind) for callback in own):
                callbacks.append(default())
        if (rows := self._get(self.config_init, "target_batch_size")) is not None:
            if any(isinstance(callback, TargetBatchSize) for callback in own):
                raise ConfigError("target_batch_size and a TargetBatchSize callback are the same: give one of the two.")
            callbacks.append(TargetBatchSize(rows))
        return super()._instantiate_trainer(config, callbacks)

    @override
    def _parse_ckpt_path(self) -> None:
        """Read settings from a checkpoint only after it was verified; ``fit`` goes on from another where it may."""
        subcommand = self.config.get("subcommand")
        settings: Any = self.config[subcommand] if subcommand else {}
        path = settings.get("ckpt_path")
        if path and Path(path).is_file():
            whole = choose_checkpoint(Path(path), fall_back=subcommand in ("fit", "probe")).path
            if not os.path.samefile(whole, path):
                settings["ckpt_path"] = str(whole)
        super()._parse_ckpt_path()


def _example(subcommand: str) -> str:
    return f"example: lightning-lora {subcommand} --config cli_configs/sft.yaml --config cli_configs/lora.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    while arguments[:1] == ["--allow"] and len(arguments) > 1:
        # In the environment, so that the processes a strategy starts see it too.
        os.environ[ALLOW_VARIABLE] = f"{os.environ.get(ALLOW_VARIABLE, '')} {arguments[1]}"
        arguments = arguments[2:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    quiet_libraries()
    try:
        if command in COMMANDS:
            run_command(command, rest)
        elif command in LoRACLI.subcommands():
            _restrict_imports()
            sys.argv[1:] = arguments  # LightningCLI warns about arguments from elsewhere
            LoRACLI()
            if torch.distributed.is_initialized():
                # Threads of gloo that are left at exit may abort a process whose work is done.
                torch.distributed.destroy_process_group()
        else:
            known = [*LoRACLI.subcommands(), *COMMANDS]
            print(f"error: unknown command {command!r}{closest(command, known)}\n\n{USAGE}", file=sys.stderr, end="")
            return 2
    except ValueError as error:
        # The parser wraps what a class raises while it is built; the cause says what was wrong.
        cause = user_error(error)
        if cause is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        return 2
    except (GradientError, GuardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as exit:
        # The Trainer turns an interrupt into exit code 1.
        if isinstance(exit.__context__, KeyboardInterrupt):
            return 130
        raise
    return 0


def _restrict_imports() -> None:
    """Let configs name only classes of packages the user trusts, and read configs only from this machine."""
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*ALLOWED_PREFIXES, *os.environ.get(ALLOW_VARIABLE, "").split()],
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,
        add_print_completion_argument=True,
    )


if __name__ == "__main__":
    sys.exit(main())
