"""Draw an adapted layer: what is frozen, what is trained, and the shapes.

    python -m docs.layer_picture

Writes docs/images/layer.svg, on a white ground that is legible on dark pages. tests/test_docs.py compares them.
"""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).parent / "images" / "layer.svg"
STYLE = """
  text { font: 15px system-ui, sans-serif; fill: #1f2933; text-anchor: middle }
  .small { font-size: 14px; fill: #52606d }
  .big { font-size: 21px; font-style: italic }
  .page { fill: #fff }
  .frozen { fill: #e4e7eb; stroke: #9aa5b1 }
  .trained { fill: #d9e8fb; stroke: #3e6fb0 }
  path { fill: none; stroke: #52606d; stroke-width: 1.5 }
"""
TIP = '<marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
ARROW = f'{TIP}<path d="M0 0 L8 4 L0 8"/></marker>'


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>'


def arrow(path: str) -> str:
    return f'<path d="{path}" marker-end="url(#tip)"/>'


def picture() -> str:
    """An SVG: the frozen weight above, the two trained matrices below."""
    lines = [
        text(26, 155, "x", "big"),
        text(26, 174, "in", "small"),
        arrow("M44 150 C80 150 80 85 128 85"),
        arrow("M44 150 C80 150 80 235 118 235"),
        box(130, 20, 170, 130, "frozen"),
        text(215, 80, "W", "big"),
        text(215, 100, "frozen, out x in", "small"),
        box(120, 209, 170, 52, "trained"),
        text(205, 232, "A", "big"),
        text(205, 251, "trained, rank x in", "small"),
        arrow("M290 235 L338 235"),
        box(340, 170, 44, 130, "trained"),
        text(362, 234, "B", "big"),
        text(362, 316, "trained, out x rank; 0 at the start", "small"),
        arrow("M384 235 L424 235"),
        text(446, 240, "· s", "big"),
        text(446, 262, "s = alpha / rank", "small"),
        arrow("M300 85 C420 85 470 130 496 148"),
        arrow("M470 228 C486 216 494 192 500 172"),
        '<circle class="page" cx="506" cy="158" r="13" style="stroke:#52606d;stroke-width:1.5"/>',
        text(506, 164, "+", "big"),
        arrow("M519 158 L560 158"),
        text(580, 163, "y", "big"),
        text(580, 182, "out", "small"),
    ]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 610 330" role="img">'
    title = "<title>y = W x + s B A x: W is frozen, A and B are trained</title>"
    ground = '<rect class="page" width="610" height="330"/>'
    return "\n".join([head, title, f"<style>{STYLE}</style>", ARROW, ground, *lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture())
