"""Layers whose weight is read by the module around them, which never calls them: an adapter would have no effect.

WavLM's attention and the mixers of state-space models read weights so. Most such layers are found in the source of the
class, which contains ``self.proj.weight`` but never ``self.proj`` alone. `LoRAGuard` finds the others during a run.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator

from torch import nn

# Reading these attributes of a weight is not computing with it; ``data`` is used to initialise it.
_METADATA = frozenset({"data", "device", "dtype", "grad", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"})
# Classes of these modules are not analysed: torch's layers are known one by one, the others hold no layers.
_NOT_ANALYSED = (
    "builtins",
    "lightning.",
    "torch.",
    "transformers.generation.",
    "transformers.modeling_",
    "transformers.utils.",
)


def uncalled_children(module: nn.Module) -> frozenset[str]:
    """Names of the children whose weight the code of ``type(module)`` reads without ever calling or passing them on.

    Empty if the source of the class cannot be read.
    """
    if not any("weight" in child._parameters for child in module.children()):
        return frozenset()
    return _uncalled(type(module)) & module._modules.keys()


@functools.cache
def _uncalled(kind: type) -> frozenset[str]:
    read: set[str] = set()
    used: set[str] = set()
    for ancestor in kind.__mro__:
        if not ancestor.__module__.startswith(_NOT_ANALYSED):
            for function in _methods(ancestor):
                _collect_uses(function, read, used)
    return frozenset(read - used)


def _methods(kind: type) -> Iterator[ast.FunctionDef]:
    """The parsed methods of a class, nested functions included."""
    found = parsed_classes(kind.__module__).get(kind.__qualname__)
    if found is not None:
        yield from (node for node in ast.walk(found) if isinstance(node, ast.FunctionDef) and node.args.args)


@functools.cache
def parsed_classes(module_name: str) -> dict[str, ast.ClassDef]:
    """Qualified name to parsed class for a source file; `inspect` would read the file again for each class."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module_name]))
    except (KeyError, OSError, TypeError, SyntaxError):  # a prompt, a notebook or a compiled module
        return {}
    return dict(_named_classes(tree, ""))


def _named_classes(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from _named_classes(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield from _named_classes(node, f"{prefix}{node.name}.<locals>.")


def _collect_uses(function: ast.FunctionDef, read: set[str], used: set[str]) -> None:
    """Add every ``self.name`` of a method to ``read`` if only its weight is read, to ``used`` if it is used itself."""
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    # Methods that build, initialise or tie a weight also read it, without computing anything.
    computes = not any(word in function.name for word in ("init", "reset", "tie"))
    this = function.args.args[0].arg
    for node in ast.walk(function):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == this):
            continue
        around = parents[node]
        if not isinstance(around, ast.Attribute):
            if isinstance(node.ctx, ast.Load):
                used.add(node.attr)
        elif around.attr == "weight":
            if computes and not _is_metadata(around, parents[around]):
                read.add(node.attr)
        elif isinstance(call := parents[around], ast.Call) and call.func is around:
            used.add(node.attr)


def _is_metadata(weight: ast.Attribute, around: ast.AST) -> bool:
    """Whether a weight is only set, compared, or asked for its type, shape or the like."""
    if not isinstance(weight.ctx, ast.Load) or isinstance(around, ast.Compare):
        return True
    if isinstance(around, ast.Attribute):
        return around.attr in _METADATA
    return isinstance(around, ast.Call) and isinstance(around.func, ast.Name) and around.func.id == "isinstance"
