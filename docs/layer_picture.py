"""Draw an adapted layer: what is frozen, what is trained, and the shapes.

    python -m docs.layer_picture

Writes docs/images/layer.svg. tests/test_docs.py compares them.
"""

from __future__ import annotations

from pathlib import Path

from docs.svg import arrow, box, drawing, text

PICTURE = Path(__file__).parent / "images" / "layer.svg"


def picture() -> str:
    """An SVG: the frozen weight above, the two trained matrices below."""
    lines = [
        text(26, 155, "x", "big middle"),
        text(26, 174, "in", "small middle"),
        arrow("M44 150 C80 150 80 85 128 85"),
        arrow("M44 150 C80 150 80 235 118 235"),
        box(130, 20, 170, 130, "frozen"),
        text(215, 80, "W", "big middle"),
        text(215, 100, "frozen, out x in", "small middle"),
        box(120, 209, 170, 52, "trained"),
        text(205, 232, "A", "big middle"),
        text(205, 251, "trained, rank x in", "small middle"),
        arrow("M290 235 L338 235"),
        box(340, 170, 44, 130, "trained"),
        text(362, 234, "B", "big middle"),
        text(362, 316, "trained, out x rank; 0 at the start", "small middle"),
        arrow("M384 235 L424 235"),
        text(446, 240, "· s", "big middle"),
        text(446, 262, "s = alpha / rank", "small middle"),
        arrow("M300 85 C420 85 470 130 496 148"),
        arrow("M470 228 C486 216 494 192 500 172"),
        '<circle class="page" cx="506" cy="158" r="13" style="stroke:var(--soft);stroke-width:1.5"/>',
        text(506, 164, "+", "big middle"),
        arrow("M519 158 L560 158"),
        text(580, 163, "y", "big middle"),
        text(580, 182, "out", "small middle"),
    ]
    return drawing(610, 330, "y = W x + s B A x: W is frozen, A and B are trained", lines)


if __name__ == "__main__":
    PICTURE.write_text(picture())
