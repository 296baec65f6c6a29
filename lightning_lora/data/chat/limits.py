"""Bounds on what a chat template may take: it is a program, and one of a stranger need not end."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple, NoReturn

from jinja2 import Environment, TemplateSyntaxError
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers.utils.chat_template_utils import _compile_jinja_template

from lightning_lora.data.chat.bounded import bounded_template, counted
from lightning_lora.errors import ChatTemplateError
from lightning_lora.time_limit import has_time_limit, time_limit

SECONDS = 1.0
"""Of computing for one conversation; most take less than a thousandth of it."""
_LOST = "{{ raise_exception('another template stands here, and transformers has lost it: render it again') }}"


class Compiled(NamedTuple):
    """A template that is rendered within bounds.

    Args:
        stand_in: The text under which ``render_jinja_template`` of transformers renders it.
        environment: The environment that it was compiled in.
    """

    stand_in: str
    environment: Environment


@lru_cache
def compiled(text: str) -> Compiled:
    """Compile a template so that it ends and makes no huge text.

    Transformers would compile the text itself without bounds, and what is constant in it is computed then. So it is
    given the text of an empty template, in whose place ours is put.

    Raises:
        ConfigError: If the text is no template, or one that does not end.
    """
    # Transformers warns of a template without these words whose marks are asked for.
    marks = "{% generation %}{% endgeneration %}" if "generation" in text else ""
    stand_in = f"{{# {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()} #}}{_LOST}{marks}"
    rendered = _compile_jinja_template(stand_in)
    try:
        with conversation_limit():
            template, written = bounded_template(rendered.environment, text)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template has an error in line {error.lineno}: {error.message}") from error
    render = template.root_render_func

    def within_bounds(context: Any) -> Iterator[str]:
        _begin_again()
        written.total = 0
        yield from counted(render(context))

    rendered.root_render_func, rendered.blocks = within_bounds, template.blocks
    return Compiled(stand_in, rendered.environment)


@contextmanager
def conversation_limit() -> Iterator[None]:
    """Stop what is compiled or rendered within the context after `SECONDS` for one conversation.

    The time is that in which this process computes. Only the main thread of a system with such a timer is stopped;
    elsewhere a warning, once, says that nothing is.

    Raises:
        ConfigError: If it takes longer, or calls itself without end.
    """
    if not has_time_limit():
        _warn_of_no_limit()
    try:
        with time_limit(SECONDS, _stop):
            yield
    except RecursionError as error:
        raise ChatTemplateError("the chat template is nested too deeply, or calls itself without end.") from error


@cache
def _warn_of_no_limit() -> None:
    rank_zero_warn(
        "a chat template that does not end would not be stopped here: only the main thread, on Linux and macOS, has a "
        "time limit. Set up data of a stranger there."
    )


def _begin_again() -> None:
    """Give the next conversation its own time."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGPROF) is _stop:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)


def _stop(*_: object) -> NoReturn:
    raise ChatTemplateError(
        f"the chat template has not ended after {SECONDS:.0f} s with one conversation: does it repeat something "
        "without end? Give another one by chat_template."
    )
