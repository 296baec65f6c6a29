"""``lightning-lora plan``: the page, ``plan.json`` and the YAML of a run that has not begun."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lora.cli.help.command import CommandParser
from lightning_lora.cli.mistakes.writing import writing
from lightning_lora.cli.plan.quick_imports import quick_imports
from lightning_lora.errors import PlanError
from lightning_lora.files.atomic import atomic_file

EXAMPLE = "example: lightning-lora plan --config cli_configs/sft.yaml --config cli_configs/lora.yaml --memory 24GiB"
_CLASSES = ["--model=lightning_lora.tasks.CausalLM", "--data=lightning_lora.data.SFTDataModule"]


def run_plan(arguments: Sequence[str], allowed: Sequence[str]) -> None:
    """Plan a run as `_run_plan` does; Ctrl-C and SIGTERM end it at once."""
    from lightning_lora.planning.stop_signals import ending_at_once

    with ending_at_once("plan"):
        _run_plan(arguments, allowed)


def _run_plan(arguments: Sequence[str], allowed: Sequence[str]) -> None:
    """Plan a run, print the page and write ``plan.json``.

    Args:
        arguments: What follows ``plan`` on the command line.
        allowed: Prefixes of class paths that a config may name beside those of known packages.

    Raises:
        ConfigError: If a setting is refused, or nothing fits into the memory.
        DataError: If the data cannot be used.
    """
    options, rest = option_parser().parse_known_args(list(arguments))
    for file in (options.json, options.write_config):
        if file and not Path(file).absolute().parent.is_dir():
            raise PlanError(f"{file} cannot be written: there is no folder {Path(file).absolute().parent}.")
        if file and Path(file).is_dir():
            raise PlanError(f"{file} is a folder: name a file in it.")
        read = [Path(word.partition("=")[2] or word) for word in rest]
        if file and Path(file).exists() and any(path.exists() and path.samefile(file) for path in read):
            raise PlanError(f"{file} is read by this plan, and would be replaced by it: name another file.")
    # Read before anything slow: a wrong unit is told at once.
    with quick_imports():
        from lightning_lora.planning.devices import find_devices

    speeds = {"efficiency": options.efficiency, "peak_tflops": options.peak_tflops, "bandwidth": options.bandwidth}
    devices = find_devices(options.memory, options.devices, options.device, **speeds)
    with quick_imports():
        from lightning_lora.cli.lora_cli import run_trainer_command
        from lightning_lora.planning.make_plan import plan
    cli = run_trainer_command(["plan", *_expanded(rest)], allowed)
    config = _fit_settings(cli.config_planned)
    rate = "model.init_args.learning_rate"
    if is_given(rest, rate):
        # The user's, even where it is the default.
        config["model"]["init_args"]["learning_rate"] = cli.config_planned.get(rate)
    trainer = config.get("trainer") or {}
    count = options.devices or _asked_devices(trainer, devices.count)
    made = plan(
        cli.model,
        cli.datamodule,
        memory=options.memory,
        devices=count,
        device=options.device,
        **speeds,
        measure=options.measure,
        calibrate=options.calibrate,
        target_batch_size=cli.config_planned.get("target_batch_size"),
        trainer=trainer,
        config=config,
    )
    print(made)
    root = trainer.get("default_root_dir") or "."
    file = Path(options.json or Path(root) / "plan.json")
    with writing(file, PlanError), atomic_file(file) as opened:
        opened.write((json.dumps(made.to_dict(), indent=2, allow_nan=False) + "\n").encode())
    print(f"written: {file}")
    if options.write_config:
        with writing(options.write_config, PlanError):
            print(f"written: {made.write_config(options.write_config)}")
    if not made.fits:
        raise PlanError(made.sentence)


def option_parser() -> CommandParser:
    """The parser of the options of ``plan`` itself; those of ``fit`` are left over."""
    parser = CommandParser(
        "lightning-lora plan",
        usage="lightning-lora plan [options] (--config FILE ... | MODEL DATA) [options of fit]",
        description="Before training: is LoRA enough, at which rank, with which settings, and what does it take.",
        epilog=f"Every option of fit is taken too, see lightning-lora fit --help. {EXAMPLE}",
        allow_abbrev=False,
    )
    parser.add_argument("--memory", metavar="24GiB", help="memory of one device (default: of those at hand)")
    parser.add_argument("--devices", type=int, metavar="N", help="number of devices (default: those at hand)")
    parser.add_argument(
        "--device", "--device-name", metavar="NAME", help="a device of the table, such as h100 or rtx4090"
    )
    parser.add_argument("--efficiency", type=float, metavar="SHARE", help="share of its peak that training reaches")
    parser.add_argument("--peak-tflops", type=float, metavar="N", help="its peak, 10^12 FLOP/s without sparsity")
    parser.add_argument("--bandwidth", metavar="3.35TB", help="bytes per second of its memory")
    parser.add_argument(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        help="time some real batches here (default: if that takes a few seconds)",
    )
    parser.add_argument("--json", metavar="FILE", help="where to write the plan (default: plan.json)")
    parser.add_argument("--write-config", metavar="FILE", help="write a YAML that fit runs, with all reasons")
    parser.add_argument(
        "--measure", action="store_true", help="run the base on some rows for at most a minute, for its own bits"
    )
    return parser


def _expanded(arguments: list[str]) -> list[str]:
    """Arguments of ``fit`` for ``MODEL DATA`` in front of others."""
    names = []
    while arguments and not arguments[0].startswith("-"):
        names.append(arguments.pop(0))
    if not names:
        if not arguments:
            raise PlanError(f"plan needs a model and data: MODEL DATA, or --config FILE. {EXAMPLE}")
        return arguments
    if len(names) == 1:
        raise PlanError(f"plan takes MODEL DATA: {names[0]!r} is one of the two. {EXAMPLE}")
    model, *data = names
    train = data[0] if len(data) == 1 else data
    named = [f"--model.init_args.model={model}", f"--data.init_args.train={train}"]
    # A config comes first, so that what is named counts more.
    configs = any(word.partition("=")[0] in ("-c", "--config") for word in arguments)
    return [*arguments, *named] if configs else [*_CLASSES, *named, *arguments]


def is_given(arguments: Sequence[str], option: str) -> bool:
    """Whether the user gives an option of ``fit``, as an argument or in a config file."""
    from lightning_lora.files.yaml_text import read_yaml

    names = (f"--{option}", f"--{option.replace('.init_args', '')}")
    for number, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if name in names:
            return True
        file = Path(value or "".join(arguments[number + 1 : number + 2]))
        if name in ("-c", "--config") and file.is_file():
            part = read_yaml(file.read_text())
            for key in option.split("."):
                part = part.get(key) if isinstance(part, dict) else None
            if part is not None:
                return True
    return False


def _fit_settings(given: Any) -> dict[str, Any]:
    """What ``fit`` would be given: seed, model, data and trainer."""
    from lightning.pytorch import Trainer

    from lightning_lora.planning.advice.config_file import plain, without_class_defaults, without_defaults

    settings = {name: plain(given.get(name)) for name in ("model", "data", "trainer")}
    for name in ("model", "data"):
        settings[name] = without_class_defaults(settings[name])
    settings["trainer"] = without_defaults(Trainer, settings["trainer"] or {})
    others = ("allow_other_base", "ckpt_path", "weights_only")
    return settings | {"seed_everything": given.get("seed_everything", 0)} | {each: given.get(each) for each in others}


def _asked_devices(trainer: dict[str, Any], here: int) -> int | None:
    """The devices of the config, if it names a number."""
    asked = trainer.get("devices")
    if isinstance(asked, str) and asked.isdigit():
        asked = int(asked)
    if isinstance(asked, list):
        asked = len(asked)
    if isinstance(asked, bool) or not isinstance(asked, int):
        return None
    nodes = trainer.get("num_nodes") or 1
    return (here if asked == -1 else asked) * int(nodes)
