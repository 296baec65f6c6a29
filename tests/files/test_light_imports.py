"""Reading, writing and merging files starts without Lightning, transformers and datasets, and never unpickles."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.support.toys import ROOT

FILES = sorted((ROOT / "lightning_lora" / "files").rglob("*.py"))

SCRIPT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
heavy = ("lightning", "torchmetrics", "transformers", "datasets", "peft", "torch._dynamo")
print([name for name in heavy if name in sys.modules])
"""


def test_no_file_of_the_room_imports_a_framework() -> None:
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_file_of_the_room_unpickles() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), file
            if isinstance(node, ast.Import):
                assert "pickle" not in {alias.name for alias in node.names}, file
