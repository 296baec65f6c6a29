"""Writes ``report.html``, ``report.md`` and ``report.csv`` into the folder of a run or a study."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from lightning_lora.errors import ResultFileError
from lightning_lora.files.atomic import write_text
from lightning_lora.study.matched.record import STUDY, read_study
from lightning_lora.study.report.content import Page
from lightning_lora.study.report.html import to_html
from lightning_lora.study.report.markdown import to_markdown
from lightning_lora.study.report.runs.run_page import run_page
from lightning_lora.study.report.runs.run_record import is_run, read_run, run_folders
from lightning_lora.study.report.studies.study_page import study_page
from lightning_lora.study.report.table import to_csv
from lightning_lora.versions import installed_version

HTML, MARKDOWN, CSV = "report.html", "report.md", "report.csv"
_MOST_NAMED = 5


def write_report(folder: str | Path, reload: int = 0, out: str | Path | None = None) -> tuple[Path, Page]:
    """Make the report of a run or a study from what its folder holds, and write it there, or into another folder.

    Args:
        folder: The folder of a run or of a study, or one with a single run somewhere below.
        reload: Seconds after which an open page reads its file again; 0: never.
        out: The folder to write into. None: that of the run or study.

    Returns:
        The folder with the report, and what it says.

    Raises:
        DataError: If there is no run and no study, more than one run, or a damaged file.
    """
    folder = find_subject(Path(folder))
    page = study_page(read_study(folder)) if (folder / STUDY).is_file() else run_page(read_run(folder))
    out = folder if out is None else Path(out)
    write_page(out, page, reload)
    return out, page


def write_page(folder: Path, page: Page, reload: int = 0) -> None:
    """Write a report into a folder."""
    made = f"Made by lightning-lora {installed_version('lightning-lora')}"
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    texts = {
        HTML: to_html(page, made, date, reload),
        MARKDOWN: to_markdown(page, f"{made}, {date}. Every number is in {CSV}."),
        CSV: to_csv(page),
    }
    for name, text in texts.items():
        write_text(folder / name, text)


def report_files(folder: Path) -> str:
    """Where the files of a report are, in words."""
    return f"{folder / HTML}, {MARKDOWN} and {CSV} beside it"


def find_subject(folder: Path) -> Path:
    """The folder of the run or study that is meant by ``folder``.

    Raises:
        DataError: If there is none, or more than one.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ResultFileError(f"{folder} {what}: give the folder of a run or of a study.")
    if (folder / STUDY).is_file() or is_run(folder):
        return folder
    studies = sorted(path.parent for path in folder.rglob(STUDY))
    found = studies or run_folders(folder)
    if len(found) == 1:
        return found[0]
    if not found:
        raise ResultFileError(
            f"{folder} holds no run and no study: there is no metrics.csv, curve.csv, events.jsonl or {STUDY} in it. "
            f"Give the folder that fit has named at its end, or the --out of a study."
        )
    named = ", ".join(map(str, found[-_MOST_NAMED:]))
    raise ResultFileError(
        f"{folder} holds {len(found)} {'studies' if studies else 'runs'}: give one of them, such as {named}."
    )
