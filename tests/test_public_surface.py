"""What the public names and signatures are: changing one is a decision, not an accident."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from docs import blocks
from tests.support import toys

SURFACE = Path(__file__).with_name("public_surface.txt")
UPDATE = "UPDATE_PUBLIC_SURFACE"
PUBLIC = ("lightning_lora", *(f"lightning_lora.{room}" for room in ("callbacks", "cli", "data", "tasks", "sharding")))


def surface() -> list[str]:
    """A line for every public name, and for the public methods that are our own, inherited ones too."""
    lines = []
    for place in PUBLIC:
        module: Any = importlib.import_module(place)
        for name in sorted(module.__all__):
            lines += described(f"{place}.{name}", getattr(module, name))
    return [re.sub(r"<object object at \w+>", "...", line) for line in lines]


def described(name: str, value: Any) -> Iterator[str]:
    if not inspect.isclass(value):
        yield f"{name}{inspect.signature(value)}"
    elif issubclass(value, Exception):
        yield f"{name}: {', '.join(base.__name__ for base in value.__bases__)}"
    else:
        yield f"{name}{inspect.signature(value)}"
        ours = [base for base in reversed(value.__mro__) if base.__module__.startswith("lightning_lora.")]
        members = {part: member for base in ours for part, member in vars(base).items()}
        for part, member in sorted(members.items()):
            is_own = isinstance(member, FunctionType) and not getattr(member, "__override__", False)
            if is_own and not part.startswith("_"):
                yield f"{name}.{part}{inspect.signature(member)}"
            elif isinstance(member, property) and not getattr(member.fget, "__override__", False):
                yield f"{name}.{part}"


def test_public_surface_is_the_one_written_down() -> None:
    found = surface()
    if os.environ.get(UPDATE):
        SURFACE.write_text("\n".join(found) + "\n")
    written = SURFACE.read_text().splitlines()
    gone, new = sorted(set(written) - set(found)), sorted(set(found) - set(written))
    assert found == written, (
        f"the public names or signatures changed.\ngone: {gone}\nnew: {new}\n"
        f"If that is meant, run: {UPDATE}=1 pytest {Path(__file__).relative_to(toys.ROOT)}"
    )


def test_every_public_name_has_an_example_that_runs() -> None:
    """In a Python block of README or a page, which `test_docs` runs."""
    text = "\n".join(block.text for block in blocks.ALL if block.language == "python" and not block.reason)
    words = set(re.findall(r"\w+", text))
    names = {name for place in PUBLIC for name in importlib.import_module(place).__all__}
    assert len(names) > 70
    assert names - words == set(), "add them to docs/reference/api/examples.md"
