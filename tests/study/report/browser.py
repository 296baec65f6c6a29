"""A real browser without a window: Chromium, where it is installed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_QUIET = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-default-browser-check", "--enable-logging=stderr"),
)
needs_chromium = pytest.mark.skipif(_CHROMIUM is None, reason="Chromium is not installed (Debian's package chromium)")


def showing(address: str, profile: Path, *options: str) -> list[str]:
    """The command that prints the page at ``address`` as it is after its scripts; its console goes to stderr."""
    root = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
    return [str(_CHROMIUM), *_QUIET, *root, f"--user-data-dir={profile}", *options, "--dump-dom", address]


def photographing(address: str, profile: Path, target: Path, size: tuple[int, int], scheme: str) -> list[str]:
    """The command that writes a PNG of the head of a page, ``size`` CSS pixels wide and high, ``light`` or ``dark``."""
    options = (
        *(f"--screenshot={target}", f"--window-size={size[0]},{size[1]}", "--force-device-scale-factor=1.5"),
        *(f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--hide-scrollbars"),
    )
    return [each for each in showing(address, profile, *options) if each != "--dump-dom"]
