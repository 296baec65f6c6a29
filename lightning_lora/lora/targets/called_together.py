"""Children that the code of a module calls one after the other with one variable, as query, key and value.

A run finds such layers by watching calls (`layers.siblings`). A compiler reads the code once, before anything is
called, so for it they are found in the source of ``forward``. Only what holds whenever that code runs counts: calls in
one block, with nothing else done with the variable in between.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator, Sequence
from itertools import groupby
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

from lightning_lora.lora.layers.linear import LoRALinear
from lightning_lora.lora.layers.siblings import CompiledGroup
from lightning_lora.lora.targets.uncalled_layers import parsed_classes

# Reading these of a tensor does not change it.
_METADATA = frozenset({"device", "dim", "dtype", "is_cuda", "ndim", "shape", "size"})
# Parts of these need not be computed, or more than once.
_CONDITIONAL = (
    ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
)  # fmt: skip
# The value is computed before it is assigned, though it stands behind.
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr)


class Calls(NamedTuple):
    """Children that a function calls one after the other with one variable.

    Args:
        place: File, name, first and last line of the function.
        runs: Names of children, in the order of their calls.
    """

    place: tuple[str, str, int, int]
    runs: tuple[tuple[str, ...], ...]


def group_compiled(module: nn.Module) -> None:
    """Let adapted linear layers that are `called_together` know each other, for when they are compiled."""
    for parent in module.modules():
        children = parent._modules
        if sum(isinstance(child, LoRALinear) for child in children.values()) < 2:
            continue
        calls = called_together(type(parent))
        # Lightning compiles a module by giving it a `forward` of its own around that of its class.
        is_own = "forward" not in parent.__dict__ or _code(parent.forward) is _code(type(parent).forward)
        if calls is None or not is_own:
            continue
        for run in calls.runs:
            layers: list[Any] = [children.get(name) for name in run]
            for is_adapted, together in groupby(layers, lambda layer: isinstance(layer, LoRALinear)):
                group = tuple(together)
                if is_adapted and len(set(group)) == len(group) > 1:
                    CompiledGroup(group, calls.place).join()


@functools.cache
def called_together(kind: type[nn.Module]) -> Calls | None:
    """What ``kind.forward`` calls together; None if its source cannot be read."""
    code = _code(kind.forward)
    owner = next((ancestor for ancestor in kind.__mro__ if "forward" in vars(ancestor)), kind)
    source = parsed_classes(owner.__module__).get(owner.__qualname__)
    for node in () if source is None else source.body:
        # Somebody may have replaced the function since.
        if isinstance(node, ast.FunctionDef) and node.name == "forward" and code and _is_source(node, code):
            place = code.co_filename, node.name, node.lineno, node.end_lineno or node.lineno
            return Calls(place, tuple(_runs(node.body, node.args.args[0].arg)))
    return None


def _code(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None)


def _is_source(node: ast.FunctionDef, code: CodeType) -> bool:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return code.co_firstlineno == first and code.co_name == node.name and bool(node.args.args)


def _runs(block: Sequence[ast.stmt], this: str) -> Iterator[tuple[str, ...]]:
    """Runs of calls in a block of statements and in the blocks within it."""
    calls = _Calls(this)
    for statement in block:
        fields = [value for _, value in ast.iter_fields(statement) if isinstance(value, list)]
        inner = [value for value in fields if value and isinstance(value[0], ast.stmt)]
        inner += [part.body for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ()))]
        if not inner:
            calls.visit(statement)
            continue
        calls.end_all()
        for statements in inner:
            yield from _runs(statements, this)
    calls.end_all()
    yield from (tuple(run) for run in calls.found if len(run) > 1)


class _Calls(ast.NodeVisitor):
    """Follows ``self.child(variable)`` through statements, in the order in which Python computes them."""

    def __init__(self, this: str) -> None:
        self.this = this
        self.open: dict[str, list[str]] = {}
        self.found: list[list[str]] = []

    def end_all(self) -> None:
        for variable in list(self.open):
            self._end(variable)

    def _end(self, variable: str) -> None:
        self.found.append(self.open.pop(variable, []))

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(ast.Attribute(ast.Name(self.this), name), [ast.Name(variable)], []):
                self.open.setdefault(variable, []).append(name)
            case _:
                self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if not (isinstance(node.value, ast.Name) and node.attr in _METADATA):
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._end(node.id)

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, _CONDITIONAL):
            for name in ast.walk(node):
                if isinstance(name, ast.Name):
                    self._end(name.id)
        elif isinstance(node, _ASSIGNMENTS) and node.value is not None:
            for part in (node.value, *(node.targets if isinstance(node, ast.Assign) else [node.target])):
                self.visit(part)
        else:
            super().generic_visit(node)
