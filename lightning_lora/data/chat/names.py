"""What a chat template reads: its variables, the keys of messages, and the words that it looks for in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import meta, nodes

from lightning_lora.data.chat.limits import compiled

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold what was thought before the answer. Templates read the first or the second of them."""


def as_read(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as a template gets it: without keys that have no value, and with its reasoning under both names.

    transformers 5.24 does the same, the versions of the lower bound do not know the names.
    """
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


@dataclass(frozen=True)
class Names:
    """What a template reads.

    Args:
        variables: Names of variables.
        keys: Keys of messages; None if it reads whole messages, for example to print them as JSON.
        words: Words that it looks for in its input, such as ``</think>``.
        date: Whether it asks for today's date.
    """

    variables: frozenset[str]
    keys: frozenset[str] | None
    words: tuple[str, ...]
    date: bool

    def unread(self, keys: Iterable[str]) -> frozenset[str]:
        """The keys among some keys of messages that the template does not read."""
        if self.keys is None:
            return frozenset()
        return frozenset(keys) - self.keys - frozenset(REASONING if self.keys.intersection(REASONING) else ())


@lru_cache
def read_names(template: str) -> Names:
    """Find what a template reads, from its syntax."""
    tree = compiled(template).environment.parse(template)
    date = any(name.name == "strftime_now" for name in tree.find_all(nodes.Name))
    variables = frozenset(meta.find_undeclared_variables(tree))
    return Names(variables, _Messages(tree).keys(), tuple(sorted(set(_words(tree)))), date)


def _words(tree: nodes.Template) -> Iterator[str]:
    looking: list[nodes.Node] = []
    for compare in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compare.ops):
            looking.append(compare.expr)
    for call in tree.find_all((nodes.Call, nodes.Filter)):
        looking += call.args or []
    for node in looking:
        if isinstance(node, nodes.Const) and isinstance(node.value, str) and node.value.strip():
            yield node.value


_LISTED = ("list", "reverse", "selectattr", "rejectattr")
_COUNTED = ("length", "count", "first", "last", *_LISTED)


class _Messages:
    """Follows the messages through a template: which names stand for the list, which for one of them."""

    def __init__(self, tree: nodes.Template) -> None:
        self._lists, self._single = {"messages"}, set[str]()
        self._uses = list(_with_parents(tree))

    def keys(self) -> frozenset[str] | None:
        """Keys of messages that the template reads; None if it uses messages in a way that reads all keys."""
        while self._follow():
            pass
        found = [self._keys(*use) for use in self._uses]
        return None if None in found else frozenset().union(*(keys for keys in found if keys))

    def _follow(self) -> bool:
        """Find further names of messages; returns whether there were any."""
        before = len(self._lists), len(self._single)
        for node, *_ in self._uses:
            if isinstance(node, nodes.For) and isinstance(node.target, nodes.Name) and self._is_list(node.iter):
                self._single.add(node.target.name)
            elif isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
                if self._is_list(node.node):
                    self._lists.add(node.target.name)
                elif self._is_message(node.node):
                    self._single.add(node.target.name)
        return before != (len(self._lists), len(self._single))

    def _is_list(self, node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in self._lists
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Slice) and self._is_list(node.node)
        if isinstance(node, nodes.CondExpr):
            return self._is_list(node.expr1)
        return isinstance(node, nodes.Filter) and node.name in _LISTED and self._is_list(node.node)

    def _is_message(self, node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Name):
            return node.name in self._single
        if isinstance(node, nodes.Getitem):
            return not isinstance(node.arg, nodes.Slice) and self._is_list(node.node)
        if isinstance(node, nodes.Getattr):
            return node.attr in ("previtem", "nextitem")  # of a loop
        return isinstance(node, nodes.Filter) and node.name in ("first", "last") and self._is_list(node.node)

    def _keys(self, node: nodes.Node, parent: nodes.Node, grandparent: nodes.Node) -> set[str] | None:
        """The keys that one use of messages reads; empty for any other node, None if it reads all keys."""
        if (isinstance(node, nodes.Name) and node.ctx != "load") or not (self._is_list(node) or self._is_message(node)):
            return set()
        if isinstance(parent, (nodes.If, nodes.And, nodes.Or, nodes.Not, nodes.CondExpr, nodes.Test)):
            return set()
        if isinstance(parent, nodes.Assign):
            return set() if isinstance(parent.target, nodes.Name) else None
        if self._is_list(node):
            return self._keys_of_list(node, parent)
        if isinstance(parent, nodes.Operand) and isinstance(grandparent, nodes.Compare):
            return _constants([grandparent.expr])
        if isinstance(parent, nodes.Getitem) and parent.node is node:
            return _constants([parent.arg])
        if not isinstance(parent, nodes.Getattr):
            return None
        if parent.attr == "get" and isinstance(grandparent, nodes.Call):
            return _constants(grandparent.args[:1])
        return None if parent.attr in ("items", "values", "keys") else {parent.attr}

    def _keys_of_list(self, node: nodes.Node, parent: nodes.Node) -> set[str] | None:
        if isinstance(parent, nodes.Filter) and parent.name in _COUNTED:
            return _constants(parent.args[:1]) or set()
        known = isinstance(parent, (nodes.For, nodes.Compare, nodes.Operand, nodes.Slice))
        return set() if known or (isinstance(parent, nodes.Getitem) and parent.node is node) else None


def _constants(expressions: list[nodes.Expr]) -> set[str] | None:
    """Texts written in the template; None for any other expression."""
    found = {str(node.value) for node in expressions if isinstance(node, nodes.Const)}
    return found if len(found) == len(expressions) else None


def _with_parents(tree: nodes.Node) -> Iterator[tuple[nodes.Node, nodes.Node, nodes.Node]]:
    """Each node of a tree with its parent and the parent of that."""
    waiting: list[tuple[nodes.Node, nodes.Node, nodes.Node]] = [(tree, tree, tree)]
    while waiting:
        node, parent, grandparent = waiting.pop()
        yield node, parent, grandparent
        waiting += [(child, node, parent) for child in node.iter_child_nodes()]
