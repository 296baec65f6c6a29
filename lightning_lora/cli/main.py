"""Which command: decided before anything heavy is imported, then only what that command needs."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence

from lightning_lora.cli.commands import COMMANDS, run_command
from lightning_lora.cli.help.short_help import OPTIONS, asks_for_short_help, short_help, without_all
from lightning_lora.cli.missing_package import missing_package
from lightning_lora.cli.plan.quick_imports import quick_imports
from lightning_lora.cli.quiet import quiet_libraries
from lightning_lora.errors import GradientError, GuardError, RewardError, did_you_mean, user_error, with_code
from lightning_lora.versions import check_own_versions, installed_version

TRAINER_COMMANDS = ("fit", "validate", "test", "predict", "probe", "preview", "plan")
_PLACES = (errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EROFS)
_USAGE = """\
usage: lightning-lora [--allow PREFIX] COMMAND ...

LoRA without regret for any LightningModule.

  fit, validate, test, predict
               Run a model: lightning-lora fit --config cli_configs/sft.yaml
  preview      Show three rows as the model sees them: lightning-lora preview rows.jsonl --model FOLDER
  plan         Before training: is LoRA enough, at which rank, at what cost: lightning-lora plan MODEL DATA
  study        Full fine-tuning against ranks, each at its best learning rate, several seeds: lightning-lora study FILE
  probe        Train for a while, then find the largest batch that does no harm; --rank: whether more rank helps.
{commands}
  --allow PREFIX   let configs name classes of your own package (repeatable)
  --version        print the version of lightning-lora

Every command explains itself with --help.
Exit codes: 0 done, 2 bad input, 3 study finished with failed runs, 130 and 143 stopped by a signal, 1 otherwise.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    allowed: list[str] = []
    while arguments[:1] == ["--allow"] and len(arguments) > 1:
        allowed.append(arguments[1])
        arguments = arguments[2:]
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help", ""):
        print(_usage(), end="")
        return 0 if command else 2
    if command == "--print_completion":  # as every program of LightningCLI has it
        command, arguments = ("schema", ["schema"]) if arguments[1:] == ["jsonschema"] else ("completion", arguments)
    if command == "--version":
        print(f"lightning-lora {installed_version('lightning-lora')}")
        return 0
    if command in OPTIONS and asks_for_short_help(arguments):
        print(short_help(command), end="")
        return 0
    quiet_libraries()
    if code := _exit_code(check_own_versions):
        return code
    if command in COMMANDS:
        return _exit_code(lambda: run_command(command, arguments[1:]))
    if command in TRAINER_COMMANDS:
        return _exit_code(lambda: _run_trainer_command(without_all(arguments), allowed))
    if command == "study":
        return _exit_code(lambda: _run_study(arguments[1:], allowed))
    nearest = did_you_mean(command, [*TRAINER_COMMANDS, "study", *COMMANDS])
    print(f"error: {with_code(f'unknown command {command!r}{nearest}')}\n\n{_usage()}", file=sys.stderr, end="")
    return 2


def _usage() -> str:
    return _USAGE.format(commands="".join(f"  {name:<13}{command.help}\n" for name, command in COMMANDS.items()))


def _run_trainer_command(arguments: list[str], allowed: Sequence[str]) -> None:
    if arguments[0] == "plan":
        from lightning_lora.cli.plan.command import run_plan

        return run_plan(arguments[1:], allowed)
    with quick_imports():
        from lightning_lora.cli.lora_cli import run_trainer_command

    run_trainer_command(arguments, allowed)


def _run_study(arguments: list[str], allowed: Sequence[str]) -> None:
    from lightning_lora.cli.study.command import run_study

    run_study(arguments, allowed)


def place(error: Exception) -> str | None:
    """A sentence about a file or folder that a user has named and that cannot be there; None for other errors."""
    if isinstance(error, OSError) and error.filename and error.errno in _PLACES:
        name = str(error.filename)
        return f"{name if len(name) <= 200 else f'...{name[-200:]}'}: {error.strerror}. Choose another place."
    return None


def _exit_code(run: Callable[[], None]) -> int:
    """Run a command; an error that the user caused is printed as one message."""
    try:
        run()
    except (GradientError, GuardError, RewardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        # The parser wraps what a class raises while it is built; the cause says what was wrong.
        cause = (user_error(error) if isinstance(error, ValueError) else None) or missing_package(error) or place(error)
        if cause is None:
            raise
        print(f"error: {with_code(str(cause))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as exit:
        # The Trainer turns an interrupt into exit code 1.
        if isinstance(exit.__context__, KeyboardInterrupt):
            return 130
        raise
    return 0
