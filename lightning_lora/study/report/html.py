"""A report as one HTML file that asks for nothing else, with a policy that lets nothing else run in it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lightning_lora.study.report.charts.svg import MARKS, NUM_STYLES
from lightning_lora.study.report.content import Page, figures_of, visible

_HERE = Path(__file__).parent


def to_html(page: Page, made: str, date: str, reload: int = 0) -> str:
    """The text of ``report.html``.

    Args:
        made: By what it was made.
        date: When, the only thing that differs when it is made again.
        reload: Seconds after which the page reads its file again; 0: never.
    """
    style, script = (_read(name) for name in ("style.css", "script.js"))
    data = _json({figure.name: figure.script for figure in figures_of(page) if figure.script is not None})
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}' '{_hash(data)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    template = environment.from_string(_read("page.html"))
    return template.render(
        page=page,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        data=Markup(data),
        made=made,
        date=date,
        marks=MARKS,
        num_styles=NUM_STYLES,
        reload=reload,
    )


def _visible(value: Any) -> Any:
    """A text of the page without characters that are not seen; one that is escaped stays so."""
    return type(value)(visible(value)) if isinstance(value, str) else value


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    """What a content security policy names a text by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(content: Any) -> str:
    """JSON that cannot end the element it is in."""
    text = json.dumps(_finite(content), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, str):
        return visible(content)
    return None if isinstance(content, float) and not math.isfinite(content) else content
