"""The commands that help before a run: what each takes, and the one call it makes."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from lightning_lora.cli.help.command import Command
from lightning_lora.cli.mistakes.writing import writing
from lightning_lora.errors import CommandError
from lightning_lora.files.atomic import atomic_file


def _recipes_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("what", choices=["list", "copy"], nargs="?", default="list", help="what to do (default: list)")
    parser.add_argument("names", nargs="*", help="those to copy (default: all)")
    parser.add_argument("--to", type=Path, default=Path("cli_configs"), help="the folder (default: cli_configs)")


def _recipes(arguments: Namespace) -> None:
    from lightning_lora.cli.help.recipes import copy_recipes, recipes

    if arguments.what == "copy":
        for path in copy_recipes(arguments.names, arguments.to):
            print(f"written: {path}")
    elif arguments.names:
        raise CommandError("recipes list takes no names; to copy: lightning-lora recipes copy NAME ...")
    else:
        for name, purpose in recipes().items():
            print(f"{name}\n    {purpose}")


def _schema_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="the file to write (default: print it)")


def _schema(arguments: Namespace) -> None:
    import json

    from lightning_lora.cli.help.schema import config_schema

    text = json.dumps(config_schema(), indent=2) + "\n"
    if arguments.out is None:
        print(text, end="")
        return
    with writing(arguments.out), atomic_file(arguments.out) as file:
        file.write(text.encode())
    print(f"written: {arguments.out}. An editor finds it by the first line of a config:")
    print(f"# yaml-language-server: $schema={arguments.out}")


def _env(arguments: Namespace) -> None:
    from lightning_lora.cli.help.environment import environment

    print(environment())


HELP_COMMANDS = {
    "recipes": Command(
        "List the configs that come with the package, or copy them to be changed.",
        "lightning-lora recipes copy sft.yaml lora.yaml",
        _recipes_arguments,
        _recipes,
    ),
    "schema": Command(
        "Write a JSON schema of configs: editors then complete names and mark mistakes.",
        "lightning-lora schema --out lightning-lora.schema.json",
        _schema_arguments,
        _schema,
    ),
    "env": Command(
        "Say what this machine has: versions, devices, memory, settings; to paste into an issue.",
        "lightning-lora env",
        lambda parser: None,
        _env,
    ),
}
