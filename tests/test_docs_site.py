"""The site as it is built: no warning, no dead link, and no page wider than a window, in a real browser."""

from __future__ import annotations

import html
import importlib
import json
import re
import subprocess
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from docs.blocks import ROOT
from tests.study.report.browser import needs_chromium, showing
from tests.support import warm

WIDTHS = (390, 1280)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; a warning fails every test."""
    built = tmp_path_factory.mktemp("docs") / "site"
    done = warm.run("-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", built)
    assert done.returncode == 0, done.stderr
    return built


class Links(HTMLParser):
    """The targets of links and pictures of a page, and the anchors on it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.append(value)
            if name == "id" and value:
                self.anchors.add(value)


def test_every_link_within_the_site_leads_to_a_page_and_a_heading(site: Path) -> None:
    pages = {page: Links(page) for page in site.rglob("*.html") if "_static" not in page.parts}
    dead = []
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchor = unquote(parts.fragment)
            if not there.exists() or (anchor and there in pages and anchor not in pages[there].anchors):
                dead.append(f"{page.relative_to(site)}: {target}")
    assert len(pages) > 80
    assert not dead


@pytest.mark.parametrize("room", ["", ".callbacks", ".tasks", ".data", ".sharding", ".cli"])
def test_the_api_has_every_public_name(site: Path, room: str) -> None:
    """Names that are imported when first asked for too."""
    module = importlib.import_module(f"lightning_lora{room}")
    page = Links(site / "reference" / "api" / f"{room[1:] or 'lightning_lora'}.html")
    assert {f"{module.__name__}.{name}" for name in module.__all__} <= page.anchors


def test_what_may_scroll_can_be_reached_by_keys(site: Path) -> None:
    text = (site / "start" / "coming_from.html").read_text()
    scrolled = re.findall(r"<pre[^>]*>|<div[^>]*table-wrapper[^>]*>", text)
    assert len(scrolled) > 12
    assert all('tabindex="0"' in each for each in scrolled)


def test_dark_pages_show_the_dark_twin_of_a_picture(site: Path) -> None:
    shown = re.findall(r"<img [^>]*study_report[^>]*>", (site / "index.html").read_text())
    assert ["only-dark" in each for each in shown] == [False, True]
    assert ["study_report_dark" in each for each in shown] == [False, True]


def test_the_site_can_be_searched(site: Path) -> None:
    assert "capacity" in (site / "searchindex.js").read_text()


class Silent(SimpleHTTPRequestHandler):
    """A server that writes no log."""

    def log_message(self, format: str, *args: object) -> None:
        pass


MEASURE = """
<!doctype html><title>measuring</title><body><pre id="found"></pre><script>
const pages = PAGES, widths = WIDTHS, found = [];
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900;
  const loaded = new Promise((resolve) => { frame.onload = resolve; });
  frame.src = page; document.body.append(frame);
  await loaded;
  const root = frame.contentDocument.documentElement;
  const wider = [...root.querySelectorAll("article *")].filter((each) => {
    if (each.closest(".table-wrapper, .highlight, pre, .math, p:has(> img)")) return false;
    return each.getBoundingClientRect().right > width + 1;
  }).slice(0, 3).map((each) => each.tagName + " " + each.textContent.trim().slice(0, 40));
  found.push([page, width, root.scrollWidth - root.clientWidth, wider]);
  frame.remove();
}
(async () => {
  const wanted = pages.flatMap((page) => widths.map((width) => [page, width]));
  await Promise.all([...Array(8)].map(async () => { while (wanted.length) await look(...wanted.pop()); }));
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>
"""


@needs_chromium
def test_no_page_is_wider_than_its_window(site: Path, tmp_path: Path) -> None:
    """Wide tables and long lines of code scroll inside of the page, at the width of a phone and of a laptop."""
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("*.html") if "_static" not in page.parts)
    pages = [page for page in pages if not page.endswith("report.html")]
    measuring = MEASURE.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
    (site / "measuring.html").write_text(measuring)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/measuring.html"
    command = showing(address, tmp_path, "--virtual-time-budget=600000")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    finally:
        server.shutdown()
        server.server_close()
        (site / "measuring.html").unlink()
    said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert said
    assert said[1], done.stdout[-500:]
    found = json.loads(html.unescape(said[1]))
    assert len(found) == len(pages) * len(WIDTHS)
    wide = [each for each in found if each[2] > 0 or each[3]]
    assert not wide, "\n".join(map(str, wide))
