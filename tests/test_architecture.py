"""Which room may know which, and how large a room and a file may be."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning
import pytest
from torch import nn

from tests.support import toys, warm
from tests.support.imports import MODULES, PACKAGE, imports, room

ROOT = toys.ROOT

LIGHTNING = ("lightning", "torchmetrics")
MODELS = (*LIGHTNING, "transformers", "datasets")
# From the bottom up: a room imports from itself and those above its row, and from no other library of these.
ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "versions": (),
    "this_command": (),
    "allowed_imports": (),
    "student_t": (),
    "batch_facts": (),
    "lightning_messages": (),
    "step_memory": (),
    "hub": LIGHTNING,
    "effective_batch": LIGHTNING,
    "lightning_private": LIGHTNING,
    "trainer_access": LIGHTNING,
    "lora": (),
    "data": MODELS,
    # Checkpoints on disk have the names that transformers gives them.
    "files": ("transformers",),
    "sharding": LIGHTNING,
    "checkpoints": LIGHTNING,
    "batch": LIGHTNING,
    "mixin": LIGHTNING,
    "memory": LIGHTNING,
    "capacity": LIGHTNING,
    "callbacks": LIGHTNING,
    "tasks": MODELS,
    "planning": MODELS,
    "study": MODELS,
    "cli": MODELS,
    "__main__": (),
    "__init__": (),
}

IMPORTS = {name: imports(name) for name in MODULES}


def test_every_room_has_a_row() -> None:
    assert {room(name) for name in MODULES} == set(ROOMS)


def test_rooms_import_from_those_below_only() -> None:
    order = list(ROOMS)
    wrong = [
        f"{name} imports {imported}"
        for name, found in IMPORTS.items()
        for imported in sorted(found)
        if (imported in MODULES and order.index(room(imported)) > order.index(room(name)))
        or (imported.partition(".")[0] in MODELS and imported.partition(".")[0] not in ROOMS[room(name)])
    ]
    assert not wrong, "\n".join(wrong)


def test_no_imports_run_in_a_circle() -> None:
    below = {name: {other for other in found if other in MODULES} for name, found in IMPORTS.items()}
    while free := [name for name, others in below.items() if not others]:
        for name in free:
            del below[name]
        for others in below.values():
            others.difference_update(free)
    assert not below, f"each of these imports another of them: {', '.join(sorted(below))}"


def private_names(tree: ast.AST) -> set[str]:
    """Private names used on objects other than ``self``, or given as strings."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            used.add(node.attr)
        elif isinstance(node, ast.Constant):
            used.add(str(node.value))
    return {name for name in used if re.fullmatch(r"_[a-z]\w+", name)}


def test_a_private_attribute_of_lightning_is_used_in_one_file() -> None:
    pattern = re.compile(r"(?:\bself\.|\bdef )(_[a-z]\w+)")
    folders = [Path(lightning.__file__).parent / name for name in ("pytorch", "fabric")]
    theirs = {name for folder in folders for path in folder.rglob("*.py") for name in pattern.findall(path.read_text())}
    ours = {*vars(nn.Module())} | {name for path in MODULES.values() for name in pattern.findall(path.read_text())}
    files: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for name in private_names(ast.parse(path.read_text())) & (theirs - ours):
            files.setdefault(name, []).append(module)
    assert "_combined_loader" in files
    shared = [f"{name}: {', '.join(modules)}" for name, modules in files.items() if len(modules) > 1]
    assert not shared, "\n".join(shared)


def test_functional_knows_tensors_only() -> None:
    allowed = {"__future__", "abc", "collections", "dataclasses", "itertools", "math", "threading", "typing"}
    allowed |= {"typing_extensions", "torch", "weakref"}
    # Kernels, and the file that says where they are used.
    for_kernels = {"triton", "functools", "importlib", "json", "os", "pathlib"}
    below = ("lightning_lora.lora.functional", "lightning_lora.errors")
    wrong = [
        f"{name} imports {imported}"
        for name, found in IMPORTS.items()
        if name.startswith("lightning_lora.lora.functional")
        for imported in found
        if imported.partition(".")[0] not in allowed | (for_kernels if ".kernels" in name else set())
        and not imported.startswith(below)
    ]
    assert not wrong, "\n".join(wrong)


def folders(top: Path) -> Iterator[tuple[Path, list[Path]]]:
    for folder in [top, *(path for path in top.rglob("*") if path.is_dir())]:
        files = sorted(folder.glob("*.py"))
        if files:
            yield folder, files


@pytest.mark.parametrize("top", [PACKAGE, ROOT / "tests"], ids=["package", "tests"])
def test_rooms_and_files_stay_small(top: Path) -> None:
    crowded = [f"{folder}: {len(files)} files" for folder, files in folders(top) if len(files) > 20]
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for _, files in folders(top) for file in files}
    long = [f"{file}: {length} lines" for file, length in lengths.items() if length > 300]
    assert not crowded + long, "\n".join(crowded + long)


def test_every_room_lists_its_files() -> None:
    missing = []
    for folder, files in folders(PACKAGE):
        told = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        inside = [file.stem for file in files] + [path.parent.name for path in folder.glob("*/__init__.py")]
        missing += [f"{folder}: {name}" for name in inside if name[0] != "_" and f"`{name}`" not in told]
    assert not missing, "\n".join(missing)


def test_the_imports_are_seen() -> None:
    assert "transformers" in IMPORTS["lightning_lora.tasks.causal_lm"]
    assert "lightning_lora.callbacks.guard" in IMPORTS["lightning_lora.callbacks"]
    assert "lightning_lora.files.adapter.folder" in IMPORTS["lightning_lora.files.adapter.fit"]
    assert "lightning_lora.errors" in IMPORTS["lightning_lora"]


LIGHT = """
import sys
import lightning_lora
frameworks = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "jsonargparse")
frameworks += ("bitsandbytes", "torchao", "triton")
print([name for name in frameworks if name in sys.modules])
lightning_lora.inject_lora
print([name for name in frameworks if name in sys.modules])
lightning_lora.LoRAMixin
print("lightning" in sys.modules, "transformers" in sys.modules)
try:
    lightning_lora.LoRAMixing
except AttributeError as error:
    print(error)
"""


@pytest.mark.slow
def test_importing_the_core_loads_no_framework() -> None:
    nothing, core, mixin, missing = warm.run_cold("-c", LIGHT).stdout.splitlines()
    assert (nothing, core) == ("[]", "['torch']")
    assert mixin.startswith("True")
    assert missing == "module 'lightning_lora' has no attribute 'LoRAMixing'"


in_a_checkout = pytest.mark.skipif((ROOT / "PKG-INFO").is_file(), reason="a source archive holds no links")


@in_a_checkout
def test_the_door_leads_to_the_callbacks() -> None:
    door = ROOT / "callbacks"
    assert door.is_symlink()
    assert os.readlink(door) == "lightning_lora/callbacks"
    for name, path in MODULES.items():
        if room(name) == "callbacks":
            source = path.read_text(encoding="utf-8")
            assert "lightning_lora.callbacks" not in source, f"{name} must import its neighbours relatively"


@in_a_checkout
def test_the_callbacks_can_be_imported_through_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module("lightning_lora.callbacks")
    monkeypatch.syspath_prepend(str(ROOT))
    try:
        assert importlib.import_module("callbacks").__all__ == real.__all__
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "callbacks"]:
            del sys.modules[name]
