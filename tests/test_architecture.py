"""Which part may know which, and what the public names are: changing either is a decision, not an accident."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from tests import toys

PACKAGE = toys.ROOT / "lightning_lora"
SURFACE = Path(__file__).with_name("public_surface.txt")
UPDATE = "UPDATE_PUBLIC_SURFACE"

# From the bottom up. A module imports from its own level and those below; a name ends in * where it is a beginning.
LEVELS = {
    "leaves": ("errors", "config", "patterns", "functional"),
    "adapters": (),  # whatever is named nowhere else: layers and the adapter operations
    "lightning": (
        "mixin",
        "optim",
        "checkpointing",
        "named_states",
        "checkpoint_shards",
        "consolidate",
        "fsdp",
        "checkpoint_io",
        "whole_checkpoint",
        "resume",
        "loop_position",
        "precision",
        "strategies",
        "callbacks",
        "accumulation",
        "sample_source",
        "batch_division",
        "row_order",
        "step_meter",
        "token_loss",
        "branches",
        "twins",
        "row_losses",
        "batch_arms",
        "batch_probe",
    ),
    # Checkpoints on disk have the names and layouts that transformers gives them.
    "tasks": ("tasks", "data", "checkpoint_model", "merge_plan", "base_check", "file_merge", "hub"),
    "commands": ("cli*", "demo*", "commands", "argument_parser", "export", "quiet", "planning", "study", "__main__"),
}
# Libraries by the lowest level that may import them, at the top of a file or inside a function.
LIBRARIES = {"lightning": "lightning", "torchmetrics": "lightning", "transformers": "tasks", "datasets": "tasks"}
# The package itself offers what needs Lightning, and loads it when asked.
LAZY = {("__init__", "mixin"), ("__init__", "batch_probe")}
ORDER = list(LEVELS)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        yield name, path


def level(name: str) -> int:
    top = name.partition(".")[0]
    for kind, names in LEVELS.items():
        if any(top.startswith(known[:-1]) if known.endswith("*") else top == known for known in names):
            return ORDER.index(kind)
    return ORDER.index("adapters")


def imports(name: str, path: Path) -> set[str]:
    """Absolute names of everything a file imports, wherever in it."""
    package = (
        ["lightning_lora", *name.split(".")]
        if path.name == "__init__.py"
        else ["lightning_lora", *name.split(".")[:-1]]
    )
    package = package[:1] if name == "__init__" else package
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


ALL = list(modules())


@pytest.mark.parametrize(("name", "path"), ALL, ids=[name for name, _ in ALL])
def test_imports_point_downwards(name: str, path: Path) -> None:
    wrong = []
    for imported in imports(name, path):
        top, _, rest = imported.partition(".")
        if top in LIBRARIES and level(name) < ORDER.index(LIBRARIES[top]):
            wrong.append(imported)
        target = rest.partition(".")[0]
        is_module = (PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").is_file()
        if top == "lightning_lora" and is_module and level(target) > level(name) and (name, target) not in LAZY:
            wrong.append(imported)
    assert not wrong, f"{name} is of level {ORDER[level(name)]!r} and imports {', '.join(sorted(wrong))}"


def test_functional_knows_tensors_only() -> None:
    allowed = {"__future__", "collections", "math", "dataclasses", "threading", "typing", "weakref", "torch"}
    for name, path in ALL:
        if name.split(".")[0] == "functional":
            ours = {imported for imported in imports(name, path) if imported.partition(".")[0] not in allowed}
            below = ("lightning_lora.functional", "lightning_lora.errors", "lightning_lora.config")
            assert all(imported.startswith(below) for imported in ours), (name, ours)


def test_the_walk_sees_what_it_should() -> None:
    found = dict(ALL)
    assert {"adapter", "layers.base", "callbacks.guard", "tasks.causal_lm", "callbacks", "__init__"} <= found.keys()
    assert "transformers.AutoModelForCausalLM" in imports("tasks.causal_lm", found["tasks.causal_lm"])
    assert "lightning_lora.callbacks.guard.LoRAGuard" in imports("callbacks", found["callbacks"])
    assert "lightning_lora.mixin.LoRAMixin" in imports("__init__", found["__init__"])


LIGHT = """
import sys
import lightning_lora
frameworks = ("lightning", "transformers", "datasets", "torchmetrics", "jsonargparse", "bitsandbytes", "torchao")
print([name for name in frameworks if name in sys.modules])
lightning_lora.LoRAMixin
print("lightning" in sys.modules, "transformers" in sys.modules)
try:
    lightning_lora.LoRAMixing
except AttributeError as error:
    print(error)
"""


def test_importing_the_core_loads_no_framework() -> None:
    frameworks, mixin, missing = toys.run_python(LIGHT).stdout.splitlines()
    assert frameworks == "[]"
    assert mixin.startswith("True")
    assert missing == "module 'lightning_lora' has no attribute 'LoRAMixing'"


def test_the_door_leads_to_the_callbacks() -> None:
    door = toys.ROOT / "callbacks"
    assert door.is_symlink()
    assert os.readlink(door) == "lightning_lora/callbacks"
    for name, path in ALL:
        if name.split(".")[0] == "callbacks":
            source = path.read_text(encoding="utf-8")
            assert "lightning_lora.callbacks" not in source, f"{name} must import its neighbours relatively"


def test_the_callbacks_can_be_imported_through_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module("lightning_lora.callbacks")
    monkeypatch.syspath_prepend(str(toys.ROOT))
    try:
        assert importlib.import_module("callbacks").__all__ == real.__all__
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "callbacks"]:
            del sys.modules[name]


def surface() -> list[str]:
    """A line for every public name, and for the public methods that are our own."""
    lines = []
    for place in (
        "lightning_lora",
        *(
            f"lightning_lora.{part}"
            for part in ("callbacks", "data", "tasks", "sharding", "strategies", "tensor_parallel")
        ),
    ):
        module: Any = importlib.import_module(place)
        names = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items() if getattr(value, "__module__", "") == place and name[0] != "_"
        ]
        for name in sorted(names):
            lines += described(f"{place}.{name}", getattr(module, name))
    return [re.sub(r"<object object at \w+>", "...", line) for line in lines]


def described(name: str, value: Any) -> Iterator[str]:
    if not inspect.isclass(value):
        yield f"{name}{inspect.signature(value)}"
    elif issubclass(value, Exception):
        yield f"{name}: {', '.join(base.__name__ for base in value.__bases__)}"
    else:
        yield f"{name}{inspect.signature(value)}"
        for part, member in sorted(vars(value).items()):
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
