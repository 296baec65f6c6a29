"""The modules of the package, and what each imports: read from the source, nothing is run."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.support import toys

PACKAGE = toys.ROOT / "lightning_lora"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(toys.ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else source for name in names}
    return found


def room(name: str) -> str:
    """The folder or file right below the package that a module is in."""
    return [*name.split("."), "__init__"][1]
