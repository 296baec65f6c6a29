"""The blocks of code in README and pages, and why some of them are not run.

A block that tests can neither run nor check has a line ``<!-- not run: REASON -->`` before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: The page it stands on, from the root of the repository.
        line: Its first line there.
        language: The word after the fence.
        text: What is in it.
        reason: Why it is not run; None where it must run or be checked.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        """Where it stands."""
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All blocks of a page that name a language, in order."""
    text = page.read_text()
    return [
        Block(
            str(page.relative_to(ROOT)),
            text.count("\n", 0, found.start()) + 1,
            found["language"],
            found["text"],
            found["reason"],
        )
        for found in _BLOCK.finditer(text)
    ]


ALL = [block for page in PAGES for block in blocks(page)]


def commands(text: str) -> list[str]:
    """The commands of a block of a shell: lines after ``$`` if there are any, else all; comments are left out."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    asked = [line[2:] for line in lines if line.startswith("$ ")] or lines
    return [line for line in (re.sub(r"\s+# .*", "", each).strip() for each in asked) if line and line[0] != "#"]
