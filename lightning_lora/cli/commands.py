"""The commands beside ``fit``: what each takes, and the one call it makes.

Each imports what it needs when it runs, so that one command does not wait for the libraries of another.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lightning_lora.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Command:
    """A command: one line of help, an example, its arguments, and what it does with them."""

    help: str
    example: str
    configure: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]


class CommandParser(ArgumentParser):
    """An argument parser whose errors are one line, with the nearest option and an example."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        _, is_unknown, words = message.partition("unrecognized arguments: ")
        known = [option for action in self._actions for option in action.option_strings]
        near = did_you_mean(words.split()[0].partition("=")[0], known) if is_unknown else "."
        print(f"error: {message}{near} {self.epilog}", file=sys.stderr)
        raise SystemExit(2)


def run_command(name: str, arguments: list[str]) -> None:
    """Parse the arguments of a command and run it; exits with code 2 on a wrong option."""
    command = COMMANDS[name]
    parser = CommandParser(f"lightning-lora {name}", description=command.help, epilog=f"example: {command.example}")
    command.configure(parser)
    command.run(parser.parse_args(arguments))


def _demo_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="the folder to write (default: demo)")
    parser.add_argument("--steps", type=int, default=45, help="optimizer steps of each run (default: 45)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order and adapters (default: 0)")


def _demo(arguments: Namespace) -> None:
    from lightning_lora.cli.demo import run_demo

    run_demo(arguments.out, arguments.steps, arguments.seed)


def _merge_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("base", help="folder of a Hugging Face checkpoint in safetensors")
    parser.add_argument("adapter", help="an adapter folder, ours or PEFT's")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 for all weights; by default each keeps its own")
    parser.add_argument(
        "--allow-other-base", action="store_true", help="merge into weights the adapter was not trained on"
    )


def _merge(arguments: Namespace) -> None:
    from lightning_lora.cli.run_source import check_merge_order
    from lightning_lora.files.merge.merge_files import merge_files

    check_merge_order(Path(arguments.base), Path(arguments.adapter))
    certificate = merge_files(
        arguments.base, arguments.adapter, arguments.out, arguments.dtype, arguments.allow_other_base
    )
    print(f"{arguments.out}: {certificate}")


def _export_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="a run folder, a Lightning checkpoint, or an adapter folder")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--format", default="peft", help="peft (the adapter only) or merged (the whole model)")
    parser.add_argument("--for", dest="target", help="vllm or llama.cpp: write what it computes as trained, or refuse")


def _export(arguments: Namespace) -> None:
    from lightning_lora.cli.export import export

    print(export(arguments.run, arguments.out, arguments.format, arguments.target))


def _inspect_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", help="a run folder, an adapter folder or an adapter-only checkpoint")
    parser.add_argument("--verify", action="store_true", help="require hashes, and say that they agree")


def _inspect(arguments: Namespace) -> None:
    import torch

    from lightning_lora.cli.inspection import inspect_path, verify_hashes
    from lightning_lora.cli.inspection_table import show
    from lightning_lora.cli.run_source import find_source

    # Threads take longer to start than the spectra of thin matrices take.
    torch.set_num_threads(1)
    inspection = inspect_path(find_source(Path(arguments.path)))
    show(inspection)
    if arguments.verify:
        print(verify_hashes(inspection))


def _consolidate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", help="a folder of shards that a sharded strategy has written")
    parser.add_argument("out", help="the checkpoint file to write")


def _consolidate(arguments: Namespace) -> None:
    from lightning_lora.checkpoints.consolidate import consolidate

    try:
        print(f"written: {consolidate(arguments.folder, arguments.out)}")
    except FileExistsError as error:
        raise ConfigError(str(error)) from error


COMMANDS = {
    "demo": Command(
        "Fine-tune the embedded model on embedded GSM8K rows, with LoRA and in full; then save, merge and check.",
        "lightning-lora demo",
        _demo_arguments,
        _demo,
    ),
    "merge": Command(
        "Fold an adapter into a base checkpoint, shard by shard; the base is only read.",
        "lightning-lora merge models/base runs/sft/version_0/adapters/last merged",
        _merge_arguments,
        _merge,
    ),
    "export": Command(
        "Write the adapter or the merged model of a run for other software, with its tokenizer.",
        "lightning-lora export runs/sft/version_0 exported --format peft --for vllm",
        _export_arguments,
        _export,
    ),
    "inspect": Command(
        "Show what an adapter or checkpoint is: base, ranks, roles, norms, spectra, health.",
        "lightning-lora inspect runs/sft/version_0 --verify",
        _inspect_arguments,
        _inspect,
    ),
    "consolidate": Command(
        "Write a folder of shards as one checkpoint file, which every strategy reads.",
        "lightning-lora consolidate runs/sft/version_0/checkpoints/last.ckpt whole.ckpt",
        _consolidate_arguments,
        _consolidate,
    ),
}
