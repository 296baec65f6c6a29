"""What the drawn pictures of the pages share: words, boxes, arrows, and colours for light and dark pages."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
  svg { --ink: #1f2933; --soft: #52606d; --ground: #fff; --box: #f5f7fa; --frozen: #e4e7eb; --edge: #9aa5b1;
        --trained: #d9e8fb; --line: #3e6fb0; --second: #b4530a; --third: #1a7f37; --fourth: #7c3aed }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e4e7eb; --soft: #a7b3c0; --ground: #131416; --box: #1c2026; --frozen: #2b3138; --edge: #6b7885;
          --trained: #1d3554; --line: #7fb0ee; --second: #f0a35e; --third: #5fc77d; --fourth: #b79bf7 }
  }
  text { font: 15px system-ui, sans-serif; fill: var(--ink) }
  .small { font-size: 13px; fill: var(--soft) }
  .bold { font-weight: 600 }
  .big { font-size: 21px; font-style: italic }
  .middle { text-anchor: middle }
  .end { text-anchor: end }
  .page { fill: var(--ground) }
  .ground { fill: var(--ground); stroke: var(--edge) }
  .box { fill: var(--box); stroke: var(--edge) }
  .frozen { fill: var(--frozen); stroke: var(--edge) }
  .trained { fill: var(--trained); stroke: var(--line) }
  path { fill: none; stroke: var(--soft); stroke-width: 1.5 }
"""
"""A picture in a page takes the scheme of the reader; it has a ground of its own where the page has another."""
TIP = (
    '<marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
    '<path d="M0 0 L8 4 L0 8"/></marker>'
)


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words with their base line at ``y``."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    """A rectangle with round corners."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>'


def arrow(path: str) -> str:
    """A path with a tip at its end."""
    return f'<path d="{path}" marker-end="url(#tip)"/>'


def drawing(width: float, height: float, title: str, lines: Iterable[str]) -> str:
    """A whole SVG; ``title`` is what a screen reader says."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
    ground = f'<rect class="page" width="{width:g}" height="{height:g}"/>'
    return "\n".join(
        [head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", TIP, ground, *lines, "</svg>", ""]
    )
