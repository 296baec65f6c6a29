"""An environment of jinja in which nothing that a template makes is larger than any conversation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

from jinja2 import Template

from lightning_lora.errors import ChatTemplateError

MAX_CHARACTERS = 10_000_000
"""More than any conversation has: a context of a million tokens is about four million characters."""
_MAX_BITS = 10_000
_PADDED = frozenset(("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "zfill"))


def bounded_template(environment: Any, text: str) -> tuple[Template, Written]:
    """The template of a text, compiled in an environment of its own, which is changed so that it keeps the bounds.

    Operators, filters, methods and captured parts are looked at before they compute: one of them can take all memory,
    or all time, before anything could stop it.

    Args:
        environment: A sandboxed environment that compiles nothing else.
        text: The text of the template.

    Returns:
        The template, and the count of what it writes, to be set to 0 before each conversation.

    Raises:
        ConfigError: When it is rendered: if it makes something that is too large.
    """
    environment.intercepted_binops = frozenset(("*", "**", "+", "%"))  # these are not computed while compiling either
    environment.call_binop = _operator(environment.binop_table)
    environment.call = _call(environment.call)
    written = Written()
    environment.finalize, environment.concat = written.count, written.join
    environment.filters = {name: _filter(name, each) for name, each in environment.filters.items()}
    template = environment.from_string(text)
    names = template.root_render_func.__globals__
    for name in ("str_join", "markup_join"):
        if name in names:
            names[name] = _join(names[name])
    return template, written


def check_size(size: int) -> None:
    """Refuse a text, or a value, of more than `MAX_CHARACTERS`.

    Raises:
        ConfigError: If it has more.
    """
    if size > MAX_CHARACTERS:
        raise ChatTemplateError(
            f"the chat template makes a text of {size} characters or more of one conversation, more than "
            f"{MAX_CHARACTERS}: give another one by chat_template."
        )


def _size(value: Any) -> int:
    """Characters that a value has as a text, at least; counting ends where they are too many."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, (Mapping, list, tuple)):
        return 1
    total, waiting = 0, [value]
    while waiting and total <= MAX_CHARACTERS:
        each = waiting.pop()
        total += 3 + (len(each) if isinstance(each, str) else 0)  # with a comma, a blank, a bracket
        if isinstance(each, Mapping):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple)):
            check_size(len(each))
            waiting += each
    return total


def _operator(table: Mapping[str, Callable[[Any, Any], Any]]) -> Callable[..., Any]:
    def compute(_: object, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * abs(right)}
            if bits.get(operator, 0) > _MAX_BITS:
                raise ChatTemplateError(
                    f"the chat template computes {operator} to a number of more than {_MAX_BITS} bits: give another "
                    "one by chat_template."
                )
        elif operator == "*":
            number, text = (left, right) if isinstance(left, int) else (right, left)
            check_size(_size(text) * (number if isinstance(number, int) else 1))
        elif operator == "+":
            check_size(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        return table[operator](left, right)

    return compute


def _check_growth(name: str, value: Any, given: tuple[Any, ...]) -> None:
    """Refuse a filter or a method of a text whose result would be too large."""
    size = _size(value)
    check_size(size)
    if name == "replace" and len(given) > 1:
        check_size(str(value).count(str(given[0])) * _size(given[1]))
    elif name == "join":  # of a text or of a list
        parts, others = (given[:1], value) if isinstance(value, str) else (value, given)
        check_size(_size(parts) + _size(others) * len(parts[0] if isinstance(value, str) and parts else parts))
    elif name == "wordwrap":
        check_size(size * max((_size(each) for each in given if isinstance(each, str)), default=1))
    elif name in ("format", "format_map"):
        _check_format(str(value), given)
    elif name in _PADDED:
        check_size(size + max((abs(each) for each in given if isinstance(each, int)), default=0))
        if name in ("indent", "tojson", "expandtabs"):
            check_size(_lines(value) * max((_size(each) * _number(each) for each in given), default=0))


def _number(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 1


def _lines(value: Any) -> int:
    """Lines and tabs of a text; of another value, which is written over several lines, its parts."""
    return value.count("\n") + value.count("\t") + 1 if isinstance(value, str) else _size(value)


def _check_format(text: str, given: tuple[Any, ...]) -> None:
    fields = text.count("%") + text.count("{")
    check_size(len(text) + fields * max(map(_size, given), default=0))
    widths = [int(digits[:10]) for digits in re.findall(r"\d{5,}", text)]
    if re.search(r"\*|\{[^{}]*\{", text):  # a width that is given
        values = [each for one in given for each in (one.values() if isinstance(one, Mapping) else (one,))]
        widths += [abs(each) for each in values if isinstance(each, int)]
    check_size(max(widths, default=0))


def _call(call: Callable[..., Any]) -> Callable[..., Any]:
    def checked(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_growth(method.__name__, owner, (*args, *kwargs.values()))
        return call(context, function, *args, **kwargs)

    return checked


def _filter(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    passed = int(hasattr(compute, "jinja_pass_arg"))  # jinja gives it the context before the value

    @wraps(compute)
    def checked(*args: Any, **kwargs: Any) -> Any:
        values = list(args)
        if name == "join" and not isinstance(values[passed], (str, list, tuple)):
            values[passed] = list(values[passed])
        _check_growth(name, values[passed], (*values[passed + 1 :], *kwargs.values()))
        return compute(*values, **kwargs)

    return checked


def _join(join: Callable[[Iterable[Any]], str]) -> Callable[[Iterable[Any]], str]:
    def checked(parts: Iterable[Any]) -> str:
        given = list(parts)
        check_size(_size(given))
        return join(given)

    return checked


class Written:
    """Counts what a template writes for one conversation, also into macros and captured parts, which it may hold.

    Attributes:
        total: Characters so far. The text of a macro in a macro is written twice.
    """

    total = 0

    def count(self, value: Any) -> Any:
        """Count what is written, and return it."""
        size = _size(value)
        self.total += size
        check_size(max(size, self.total // 10))
        return value

    def join(self, parts: Iterable[str]) -> str:
        """The text of a macro or a captured part."""
        return self.count("".join(counted(parts)))


def counted(parts: Iterable[str]) -> Iterator[str]:
    """The parts of a text, as long as together they are no longer than any conversation.

    Raises:
        ConfigError: If they are longer.
    """
    total = 0
    for part in parts:
        total += len(part)
        check_size(total)
        yield part
