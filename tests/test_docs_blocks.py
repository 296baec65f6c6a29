"""Blocks of README and pages that are not Python: commands whose options exist, YAML whose names exist."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import blocks
from docs.blocks import ROOT, Block

NOT_RUN = Counter(
    {
        "TRL is not installed with the tests": 1,
        "a config of another program": 2,
        "it takes a gigabyte of memory": 1,
        "litgpt is not installed with the tests": 1,
        "llama.cpp is another project": 1,
        "needs a GPU": 1,
        "the model would be downloaded": 1,
        "vLLM needs a GPU": 1,
    }
)
"""Why blocks are not run, and how many."""
LANGUAGES = {"python", "console", "yaml", "text"}


def test_what_is_not_run_is_listed_here() -> None:
    assert Counter(block.reason for block in blocks.ALL if block.reason) == NOT_RUN


@pytest.mark.parametrize("page", blocks.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_its_language(page: Path) -> None:
    """A block without one would be neither run nor checked."""
    fences = [line for line in page.read_text().splitlines() if line.startswith("```")]
    opening = {line.removeprefix("```") for line in fences[::2]}
    assert opening <= LANGUAGES | {"{toctree}", "{eval-rst}"}
    assert set(fences[1::2]) <= {"```"}


def of(language: str) -> list[Block]:
    return [block for block in blocks.ALL if block.language == language and not block.reason]


@pytest.mark.parametrize("block", of("console"), ids=str)
def test_commands_exist_and_take_these_options(block: Block) -> None:
    asked = blocks.commands(block.text)
    assert asked
    for line in asked:
        words = [word for word in shlex.split(line) if not word.startswith("PYTHONPATH=")]
        {"lightning-lora": check_ours, "pip": check_pip, "make": check_make, "python": check_python}[words[0]](
            words[1:]
        )


def check_make(words: list[str]) -> None:
    targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
    assert {word for word in words if "=" not in word} <= targets


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    _, _, table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")
    extras = set(re.findall(r"^(\w+) = \[", table.partition("\n\n")[0], flags=re.MULTILINE))
    for word in words[1:]:
        name, _, extra = word.rstrip("]").partition("[")
        assert not extra or name not in (".", "lightning-lora") or extra in extras


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert (ROOT / words[1].replace(".", "/")).with_suffix(".py").is_file() or words[1] in ("pip", "sphinx")
    else:
        assert (ROOT / words[0]).is_file()


def check_ours(words: list[str]) -> None:
    from lightning_lora.cli import commands
    from lightning_lora.cli.main import TRAINER_COMMANDS
    from lightning_lora.cli.plan.command import option_parser as plan_parser
    from lightning_lora.cli.study.command import option_parser as study_parser

    while words[0] == "--allow":
        words = words[2:]
    if words[0].startswith("--"):
        assert words in (["--help"], ["--version"])
        return
    name, *rest = words
    if name in commands.COMMANDS:
        commands.command_parser(name).parse_args(rest)
        return
    assert name in (*TRAINER_COMMANDS, "study")
    if name in ("plan", "study"):
        _, rest = (plan_parser() if name == "plan" else study_parser()).parse_known_args(rest)
    check_fit(name, rest)


def check_fit(command: str, words: list[str]) -> None:
    """Options of a command that runs a Trainer; classes are those of the first config file."""
    plain = {"config", "ckpt_path", "allow_other_base", "seed_everything", "target_batch_size", "print_config", "rank"}
    kinds: dict[str, Any] = {"model": "lightning_lora.tasks.CausalLM", "data": "lightning_lora.data.SFTDataModule"}
    options = [word.removeprefix("--").partition("=") for word in words if word.startswith("--")]
    files = [word for word in words if word.startswith(("cli_configs/", "studies/"))]
    for file in files:
        loaded = yaml.safe_load((ROOT / file).read_text())
        kinds |= {part: loaded[part]["class_path"] for part in kinds if "class_path" in (loaded.get(part) or {})}
    for option, _, _ in options:
        part, _, name = option.partition(".")
        if part in ("batch_probe", "rank_probe"):
            kind = "lightning_lora.BatchProbe" if part == "batch_probe" else "lightning_lora.RankProbe"
            assert command == "probe"
            assert name in settings_of(kind), option
        elif part == "trainer":
            assert name.partition(".")[0].rstrip("+") in settings_of("lightning.pytorch.Trainer"), option
        elif part in kinds and name:
            check_setting(kinds[part], name.removeprefix("init_args."))
        else:
            assert part in plain | kinds.keys(), option


def check_setting(kind: str, name: str) -> None:
    """A dotted setting of a class; below ``lora`` those of `LoRAConfig`."""
    first, _, below = name.partition(".")
    assert first in settings_of(kind), f"{kind} takes no {first}"
    if first == "lora" and below:
        assert below in settings_of("lightning_lora.LoRAConfig")


def settings_of(kind: str) -> set[str]:
    """The arguments of a class and of the classes to which it hands others on."""
    module, _, name = kind.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    return {parameter for each in inspect.getmro(found) for parameter in _parameters(each)}


def _parameters(kind: type) -> Iterator[str]:
    if "__init__" in vars(kind):
        yield from inspect.signature(kind.__init__).parameters


CHECKS = {"lightning-lora": check_ours, "pip": check_pip, "make": check_make, "python": check_python}


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_names_in_yaml_exist(block: Block) -> None:
    from lightning_lora.study.matched.spec import StudySpec

    loaded = yaml.safe_load(block.text)
    run = {"trainer", "model", "data", "target_batch_size", "reward"}
    study = {field.name for field in fields(StudySpec)} | {"configs", "overrides", "learning_rates"}
    assert loaded.keys() <= run | study, block
    for kind, given in classes(loaded):
        for name in given:
            check_setting(kind, name)
    for part, kind in (("model", "lightning_lora.tasks.CausalLM"), ("data", "lightning_lora.data.SFTDataModule")):
        part_of_run = loaded.get(part) or {}
        for name in part_of_run.get("init_args", {}) if "class_path" not in part_of_run else ():
            check_setting(kind, name)
    assert (loaded.get("trainer") or {}).keys() <= settings_of("lightning.pytorch.Trainer")


def classes(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every class path below ``node`` with its arguments."""
    if isinstance(node, dict):
        if "class_path" in node:
            yield node["class_path"], node.get("init_args") or {}
        node = list(node.values())
    for each in node if isinstance(node, list) else ():
        yield from classes(each)
