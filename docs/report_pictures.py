"""Photograph the heads of two reports, light and dark, in a Chromium without a window.

    python -m docs.report_pictures RUN

Writes docs/images/study_report.png from docs/findings/facts_over_capacity, docs/images/run_report.png from the folder
of a run (the one of docs/understand/capacity.md), and for each a twin NAME_dark.png, which dark pages show.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from lightning_lora.study.report.write import HTML
from tests.study.report.browser import photographing

DOCS = Path(__file__).parent
STUDY = DOCS / "findings" / "facts_over_capacity" / HTML
SIZES = {"study_report": (640, 590), "run_report": (640, 920)}
"""Width and height in CSS pixels: a width at which letters can be read on a phone too."""


def photograph(page: Path, name: str) -> None:
    """One picture for each scheme, of 1.5 pixels for a CSS pixel and 256 colours."""
    for scheme, suffix in (("light", ""), ("dark", "_dark")):
        target = DOCS / "images" / f"{name}{suffix}.png"
        with tempfile.TemporaryDirectory() as profile:
            command = photographing(page.resolve().as_uri(), Path(profile), target, SIZES[name], scheme)
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(target) as picture:
            picture.convert("RGB").quantize(256).save(target, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run, with its report.html")
    photograph(STUDY, "study_report")
    photograph(parser.parse_args().run / HTML, "run_report")
