"""What every report holds to, of a run or of a study, whatever its names are."""

from __future__ import annotations

import base64
import csv
import hashlib
import re
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_lora.study.report import html
from lightning_lora.study.report.content import visible
from lightning_lora.study.report.write import CSV, HTML, MARKDOWN, write_report
from tests.study.report.html_page import HtmlPage
from tests.study.report.planted_run import plant_run
from tests.study.report.planted_study import plant, plant_more
from tests.support import warm

EVIL = "<script>alert(1)</script>"
NAMES = (
    EVIL,
    '"><img src=x onerror=alert(1)>',
    "=cmd|' /C calc'!A0",
    'a | `b` "q" & \' *bold* </style>',
    "x" * 300,
    "\u2028 ü 漢字",
    "\u202egnp.exe \u2066 عربي\x07",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run and a study with ordinary names, and both with names that try to break out of their texts."""
    top = tmp_path_factory.mktemp("reports")
    failed = {("rank 1", 2): f"{EVIL} at step 3"}
    found = {
        "run": plant_run(top / "run"),
        "bad run": plant_run(top / f'bad "><img src=x> {"y" * 60}\u202e', name=EVIL, how="failed"),
        "study": plant(top / "study", {"rank 1": 0.03, "rank 8": 0.0005}, failed=failed),
        "full study": plant_more(plant(top / "full", {"rank 1": 0.03, "rank 8": 0.0005})),
        "bad study": plant_more(plant(top / "bad-study", {name: 0.001 * number for number, name in enumerate(NAMES)})),
    }
    for folder in found.values():
        write_report(folder)
    return found


@pytest.fixture(params=["run", "bad run", "study", "full study", "bad study"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def page_of(folder: Path) -> HtmlPage:
    return HtmlPage((folder / HTML).read_text(encoding="utf-8"))


def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_names_what_is_in_the_page_and_nothing_else(folder: Path) -> None:
    page = page_of(folder)
    (policy,) = (each.attributes["content"] for each in page.all_of("meta") if "http-equiv" in each.attributes)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["style-src"] == " ".join(hash_of(each.text) for each in page.all_of("style"))
    scripts = {hash_of(each.text) for each in page.all_of("script")}
    assert set(rules["script-src"].split()) == scripts
    assert len(scripts) == 2
    # It counts from where it stands: before anything that it must forbid.
    first = next(place for place, each in enumerate(page.elements) if "http-equiv" in each.attributes)
    assert {each.name for each in page.elements[:first]} <= {"html", "head", "meta"}


def test_nothing_is_asked_for_and_nothing_runs_but_our_script(folder: Path) -> None:
    for element in page_of(folder).elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), name
            assert name not in ("style", "src", "action", "srcset", "xlink:href"), name
            assert name != "href" or str(value).startswith("#")
    assert "@import" not in (folder / HTML).read_text(encoding="utf-8")
    assert "url(" not in (folder / HTML).read_text(encoding="utf-8")


def test_names_stay_texts(folders: dict[str, Path]) -> None:
    for name in ("bad run", "bad study"):
        text = (folders[name] / HTML).read_text(encoding="utf-8")
        assert EVIL not in text
        assert "&lt;script&gt;alert(1)" in text
    page = page_of(folders["bad study"])
    heads = {each.text for each in page.all_of("th")}
    assert set(map(visible, NAMES)) <= heads
    assert not page.all_of("img")
    markdown = (folders["bad study"] / MARKDOWN).read_text(encoding="utf-8")
    assert "<script>" not in markdown.partition("```text")[0]
    # No name adds a cell to a row.
    for block in re.findall(r"^\|.*\n\|[-:|]+\n(?:\|.*\n)+", markdown, re.M):
        counts = {len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1, block
    with (folders["bad study"] / CSV).open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "@"))]
    assert any(cell.startswith("'=cmd") for cell in cells)


def test_no_name_turns_the_words_beside_it_around(folders: dict[str, Path]) -> None:
    for name in ("bad run", "bad study"):
        for file in (HTML, MARKDOWN, CSV):
            text = (folders[name] / file).read_text(encoding="utf-8")
            assert not re.findall("[\x00-\x08\x0b-\x1f\u200e\u200f\u202a-\u202e\u2066-\u2069]", text), file
            assert name == "bad run" or "U+202E" in text.replace("\\", ""), file


def test_a_page_is_valid_html(folder: Path) -> None:
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed: pip install lightning-lora[dev]")
    html5lib.HTMLParser(strict=True).parse((folder / HTML).read_text(encoding="utf-8"))


def test_a_page_is_well_formed_and_can_be_read_without_seeing(folder: Path) -> None:
    page = page_of(folder)
    ids = [each.attributes["id"] for each in page.elements if "id" in each.attributes]
    assert len(set(ids)) == len(ids)
    for element in page.elements:
        for name in ("aria-labelledby",):
            assert set(str(element.attributes.get(name, "") or "").split()) <= set(ids)
        assert element.attributes.get("href", "#")[1:] in ("", *ids)  # pyright: ignore[reportOptionalSubscript]
    (html_element,) = page.all_of("html")
    assert html_element.attributes["lang"] == "en"
    assert len(page.all_of("main")) == len(page.all_of("h1")) == 1
    levels = [int(each.name[1]) for each in page.elements if re.fullmatch("h[1-6]", each.name)]
    assert all(second - first <= 1 for first, second in pairwise(levels))
    for table in page.all_of("table"):
        assert "tabindex" in page.elements[page.elements.index(table) - 1].attributes  # its box scrolls
    assert len(page.all_of("caption")) == len(page.all_of("table"))
    assert all(each.attributes.get("scope") in ("col", "row") for each in page.all_of("th"))
    labels = [each.attributes["aria-label"] for each in page.elements if each.attributes.get("role") == "region"]
    labels += [each.text for each in page.all_of("h2")]
    assert len(set(labels)) == len(labels)
    drawings = [each for each in page.all_of("svg") if each.attributes.get("aria-hidden") != "true"]
    assert drawings
    assert all(each.attributes["role"] == "img" and each.attributes["aria-labelledby"] for each in drawings)
    assert not page.all_of("button"), "a button that does nothing without the script"
    assert all(each.text.strip() for each in page.all_of("figcaption"))


def test_a_report_made_again_is_the_same_but_for_the_date(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts() -> list[str]:
        found = [(folder / name).read_text(encoding="utf-8") for name in (HTML, MARKDOWN, CSV)]
        return [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "DATE", text) for text in found]

    before = texts()
    assert [text.count("DATE") for text in before] == [1, 1, 0]
    write_report(folder)
    assert texts() == before


def test_every_number_of_the_text_is_in_the_csv(folder: Path) -> None:
    with (folder / CSV).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Row and column names of tables are texts of their own.
    known = " ".join(f"{row['shown']} {row['row']} {row['column']}" for row in rows)
    numbers = set(re.findall(r"\d[\d.,]*\d|\d", known))
    page = page_of(folder)
    cells = [each.text for each in page.elements if each.name in ("td", "h1") or each.attributes.get("class") == "lede"]
    shown = set(re.findall(r"\d[\d.,]*\d|\d", " ".join(cells)))
    assert len(shown) > 20
    assert shown <= numbers, sorted(shown - numbers)


def test_what_is_shown_is_the_number_of_the_csv(folder: Path) -> None:
    with (folder / CSV).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if re.fullmatch(r"[-+]?\d[\d,]*(\.\d+)?%?", row["shown"])]
    assert len(rows) > 50
    for row in rows:
        if re.fullmatch(r"-?[\d.]+(e-?\d+)?", row["value"]):
            shown = float(row["shown"].replace(",", "").rstrip("%")) / (100 if row["shown"].endswith("%") else 1)
            value = float(row["value"])
            last = 10.0 ** -len(row["shown"].rstrip("%").partition(".")[2])
            assert abs(shown - value) <= max(0.006 * abs(value), 0.51 * last * (0.01 if "%" in row["shown"] else 1)), (
                row
            )


def test_a_long_run_with_many_measurements_stays_small(tmp_path: Path) -> None:
    folder = plant_run(tmp_path / "run", steps=5000)
    write_report(folder)
    assert (folder / HTML).stat().st_size < 300_000
    page = page_of(folder)
    longest = max(len(re.findall("[ML]", str(each.attributes.get("d")))) for each in page.all_of("path"))
    assert 200 < longest <= 600  # an interval goes there and back


def test_a_large_study_stays_small(tmp_path: Path) -> None:
    folder = plant(tmp_path / "study", {f"rank {rank}": 0.001 for rank in range(1, 9)}, seeds=5)
    write_report(folder)
    assert (folder / HTML).stat().st_size < 300_000


def _brightness(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.03928 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_brightness(one), _brightness(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_what_is_behind_them() -> None:
    style = html._read("style.css")
    schemes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(schemes) == 2
    for colours in schemes:
        for text in ("front", "quiet", "link", "live", "good", "bad", "better", "open"):
            for back in ("back", "soft"):
                assert _contrast(colours[text], colours[back]) >= 4.5, (text, back)
        for number in range(8):
            # Names of lines are texts in their colours.
            assert _contrast(colours[f"s{number}"], colours["back"]) >= 4.5, number
            assert _contrast(colours[f"s{number}"], colours["band"]) >= 3, number
    shades = re.findall(r"\.heat-\d \{ background: (#\w{6}); color: (#\w{6}); \}", style)
    assert len(shades) == 9
    assert all(_contrast(back, front) >= 4.5 for back, front in shades)


@pytest.mark.slow
def test_a_report_starts_without_the_libraries_of_training() -> None:
    code = (
        "import sys, lightning_lora.study.report.write; print({'lightning', 'transformers', 'scipy'} & {*sys.modules})"
    )
    assert warm.run_cold("-c", code).stdout.strip() == "set()"
