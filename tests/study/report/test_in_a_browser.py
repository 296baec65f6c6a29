"""The script of a report runs under the page's own policy in a real browser, and has nothing to complain about."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from lightning_lora.study.report.write import HTML, write_report
from tests.study.report.browser import needs_chromium, showing
from tests.study.report.html_page import HtmlPage
from tests.study.report.planted_run import plant_run
from tests.study.report.planted_study import plant

pytestmark = [
    pytest.mark.slow,
    needs_chromium,
]


def opened(file: Path, profile: Path) -> tuple[HtmlPage, list[str]]:
    """The page after its script has run, and what was written to the console."""
    done = subprocess.run(showing(file.as_uri(), profile), capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if re.search(r"\bCONSOLE\b", line)]
    return HtmlPage(re.sub(r"^<!doctype html>", "<!DOCTYPE html>", done.stdout, flags=re.I)), said


@pytest.mark.parametrize("kind", ["run", "study"])
def test_the_script_adds_its_buttons_and_says_nothing(kind: str, tmp_path: Path) -> None:
    if kind == "run":
        folder = plant_run(tmp_path / "run")
    else:
        folder = plant(tmp_path / "study", {'"><img src=x onerror=alert(1)>': 0.0, "rank 8": 0.03})
    write_report(folder)
    page, said = opened(folder / HTML, tmp_path / "profile")
    assert said == []
    words = [each.text for each in page.all_of("button")]
    assert {"Zoom in", "Zoom out", "Show all", "steps", "tokens", "seconds"} <= set(words)
    pressed = [each.attributes["aria-pressed"] for each in page.all_of("button") if "aria-pressed" in each.attributes]
    assert "true" in pressed
    # Envelopes are in the legend, and off.
    assert (pressed.count("false") > 2) is (kind == "study")
    assert not page.all_of("img")
