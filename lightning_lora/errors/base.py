"""The base class of all errors, with the code of each and the page that explains it."""

from __future__ import annotations

import re

CODE = re.compile(r" ?\[LL\d+ [\w.#/-]+\]")


class LoRAError(Exception):
    """The base class of all errors that this package raises on purpose.

    Attributes:
        code: Names the kind of error in ``docs/reference/errors.md``, as ``LL201``.
        page: The page of the documentation, and the heading on it, that explains what went wrong.
    """

    code = "LL000"
    page = "reference/errors.md"

    @property
    def message(self) -> str:
        """What was wrong, where, and what to do, without a code; also if it quotes another error."""
        return CODE.sub("", super().__str__())

    def __str__(self) -> str:
        return f"{self.message} [{self.code} {self.page}]"
