"""Layers whose weight the module around them reads without calling them: an adapter would silently do nothing.

`LoRAGuard` finds such layers in a run. Most can be told before it, from the code of the class: it says
``self.proj.weight`` and never ``self.proj`` alone, as WavLM's attention and the mixers of state-space models do.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator

from torch import nn

# Asking a weight what it is, is not computing with it; ``data`` is how it is initialised.
_ASKED = frozenset({"data", "device", "dtype", "grad", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"})
# torch's own layers that read weights are known one by one; the other classes hold no layers of their own.
_KNOWN = (
    "builtins",
    "lightning.",
    "torch.",
    "transformers.generation.",
    "transformers.modeling_",
    "transformers.utils.",
)


def uncalled_children(module: nn.Module) -> frozenset[str]:
    """Names of the children whose weight the code of ``type(module)`` reads, without ever calling or passing them on.

    Empty where the source of the class cannot be read.
    """
    if not any("weight" in child._parameters for child in module.children()):
        return frozenset()
    return _uncalled(type(module)) & module._modules.keys()


@functools.cache
def _uncalled(kind: type) -> frozenset[str]:
    read: set[str] = set()
    used: set[str] = set()
    for ancestor in kind.__mro__:
        if not ancestor.__module__.startswith(_KNOWN):
            for function in _methods(ancestor):
                _sort(function, read, used)
    return frozenset(read - used)


def _methods(kind: type) -> Iterator[ast.FunctionDef]:
    found = _classes(kind.__module__).get(kind.__qualname__)
    if found is not None:
        yield from (node for node in ast.walk(found) if isinstance(node, ast.FunctionDef) and node.args.args)


@functools.cache
def _classes(module_name: str) -> dict[str, ast.ClassDef]:
    """The classes of a source file by qualified name; `inspect` would read the file anew for each of them."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module_name]))
    except (KeyError, OSError, TypeError, SyntaxError):  # a prompt, a notebook, a compiled module: LoRAGuard remains
        return {}
    return dict(_named_classes(tree, ""))


def _named_classes(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from _named_classes(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield from _named_classes(node, f"{prefix}{node.name}.<locals>.")


def _sort(function: ast.FunctionDef, read: set[str], used: set[str]) -> None:
    """Put every ``self.name`` of a method where it belongs."""
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    # What builds, initialises or ties a weight reads it too, and computes nothing.
    computes = not any(word in function.name for word in ("init", "reset", "tie"))
    for node in _attributes_of(function.args.args[0].arg, function):
        around = parents[node]
        if not isinstance(around, ast.Attribute):
            if isinstance(node.ctx, ast.Load):
                used.add(node.attr)
        elif around.attr == "weight":
            if computes and not _is_aside(around, parents[around]):
                read.add(node.attr)
        elif _is_called(around, parents[around]):
            used.add(node.attr)


def _attributes_of(this: str, function: ast.FunctionDef) -> Iterator[ast.Attribute]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == this:
            yield node


def _is_called(attribute: ast.Attribute, around: ast.AST) -> bool:
    return isinstance(around, ast.Call) and around.func is attribute


def _is_aside(weight: ast.Attribute, around: ast.AST) -> bool:
    """Whether a weight is only set, compared, or asked what it is."""
    if not isinstance(weight.ctx, ast.Load) or isinstance(around, ast.Compare):
        return True
    if isinstance(around, ast.Attribute):
        return around.attr in _ASKED
    return isinstance(around, ast.Call) and isinstance(around.func, ast.Name) and around.func.id == "isinstance"
