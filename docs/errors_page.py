"""Writes the page of errors from the docstrings of their classes and one error of each that is really raised.

Run ``python -m docs.errors_page`` after a change.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from docs.error_examples import EXAMPLES
from lightning_lora.errors import LoRAError

PAGE = Path(__file__).parent / "reference" / "errors.md"
_HEAD = """\
# Errors: what each code means and what to do

Every error of this package ends with a code and the page that explains its subject, as in
`rank must be at least 1, got 0. [LL101 use/hyperparameters.md]`. `error.code` and `error.page` hold them. Broad classes
catch the narrow ones: `except ConfigError`, `AdapterFileError` or `DataError`, and `LoRAError` for all. This page is
made by `python -m docs.errors_page` from the classes; each example is raised by a test.
"""


def error_classes(kind: type[LoRAError] = LoRAError) -> Iterator[type[LoRAError]]:
    """All classes of errors below one that have a code of their own, in the order of their codes."""
    below = {each for sub in kind.__subclasses__() for each in (sub, *error_classes(sub)) if "code" in vars(each)}
    yield from sorted(below, key=lambda each: each.code)


def example(raises: Callable[[], object]) -> LoRAError:
    """The error that a call raises in an empty folder."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        try:
            raises()
        except LoRAError as error:
            return error
        except Exception as error:
            if isinstance(error.__cause__, LoRAError):
                return error.__cause__
            raise
        finally:
            os.chdir(before)
    raise AssertionError(f"{raises} raises nothing")


def shown(error: LoRAError) -> str:
    """The first line of an error's message, without what differs from machine to machine."""
    return re.sub(r"[0-9a-f]{32}|/\S*/tmp\w+", "...", error.message).splitlines()[0]


def page(examples: Mapping[type[LoRAError], Callable[[], object]] = EXAMPLES) -> str:
    """The text of the page."""
    parts = [_HEAD]
    for kind in error_classes():
        what, todo = (" ".join(part.split()) for part in (inspect.getdoc(kind) or "").split("\n\n")[:2])
        more = f"More: [{kind.page}](../{kind.page})."
        parts.append(
            f"## {kind.code}\n\n`{kind.__name__}`: {what}\n\n**What to do.** {todo} {more}\n"
            f"\n```text\n{shown(example(examples[kind]))}\n```\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    PAGE.write_text(page(), encoding="utf-8")
