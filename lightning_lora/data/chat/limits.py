"""Bounds on what a chat template may take: it is a program, and one of a stranger need not end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template

from lightning_lora.errors import ChatTemplateError

SECONDS = 1.0
SECONDS_EACH = 0.1
MAX_CHARACTERS = 10_000_000
"""More than any conversation has: a context of a million tokens is about four million characters."""


@lru_cache
def compiled(text: str) -> Template:
    """The template that transformers renders for this text, which may no longer repeat a text without bound.

    Raises:
        ConfigError: If the text is no template, or one that does not end.
    """
    try:
        with time_limit(0):  # what is constant in it is computed now
            template = _compile_jinja_template(text)
        environment: Any = template.environment
        environment.intercepted_binops = frozenset("*")
        environment.call_binop = _product
        template.root_render_func = environment.from_string(text).root_render_func
    except TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template has an error in line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise ChatTemplateError("the chat template is nested too deeply.") from error
    return template


@contextmanager
def time_limit(num_conversations: int) -> Iterator[None]:
    """Stop what is rendered within the context after `SECONDS`, and `SECONDS_EACH` for each conversation.

    The time is that in which this process computes. Only the main thread of a system with such a timer is stopped.

    Raises:
        ConfigError: If it takes longer.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    seconds = SECONDS + SECONDS_EACH * num_conversations

    def stop(*_: object) -> NoReturn:
        raise ChatTemplateError(
            f"the chat template has not ended after {seconds:.1f} s: does it "
            "repeat something without end? Give another one by chat_template."
        )

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _product(_: object, operator: str, left: Any, right: Any) -> Any:
    number, text = (left, right) if isinstance(left, int) else (right, left)
    if isinstance(number, int) and hasattr(text, "__len__"):
        _check_size(number * len(text))
    return left * right


def check_length(texts: list[str]) -> None:
    """Refuse a text that is longer than any conversation.

    Raises:
        ConfigError: If one has more than `MAX_CHARACTERS`.
    """
    _check_size(max(map(len, texts), default=0))


def _check_size(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise ChatTemplateError(
            f"the chat template makes a text of {length} characters of one conversation, more than {MAX_CHARACTERS}: "
            "give another one by chat_template."
        )
