"""What is refused leaves a half-finished study as it was, and that goes on to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.study.matched.cells import Cell
from lightning_lora.study.matched.open_study import open_study
from lightning_lora.study.matched.record import read_results, read_study
from lightning_lora.study.matched.spec import StudySpec
from lightning_lora.study.matched.worker import Worker
from lightning_lora.study.report.write import write_report
from tests.study.matched import planted

MOST = 4


def work(folder: Path, spec: StudySpec, most: int | None = None, storage: str | None = None) -> Worker:
    """Open a study and do its runs, or the first of them."""
    store = open_study(spec, planted.DATA, folder, storage)
    worker = Worker(spec, planted.DATA, folder, store, run, lambda line: None)
    if most is None:
        worker.work()
    for _ in range(most or 0):
        plan, _ = worker.plan()
        claim = store.claim()
        assert claim is not None
        worker._do([claim], plan)
    worker.plan()
    return worker


def run(cell: Cell, folder: Path, lost: Any) -> Any:
    return planted.outcome(planted.planted_loss(cell))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def other_arm(spec: StudySpec) -> StudySpec:
    return spec.with_configs({arm.name: {"arm": f"another {arm.name}"} for arm in spec.arms})


REFUSED: dict[str, tuple[Callable[[StudySpec], StudySpec], str]] = {
    "another study": (lambda spec: replace(spec, name="ranks"), "holds the study 'planted', and this one is 'ranks'"),
    "another band": (lambda spec: replace(spec, band=0.1), "holds another study 'planted': its band differ"),
    "another baseline": (lambda spec: replace(spec, baseline="rank 1"), "its baseline differ"),
    "other selection seeds": (lambda spec: replace(spec, selection_seeds=(0, 9)), "its selection seeds differ"),
    "other arms": (other_arm, "its arm 'full', arm 'rank 1', arm 'rank 8' differ"),
    "halving": (lambda spec: replace(spec, halving=True), "its halving differ"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=list(REFUSED))
def test_a_refused_study_changes_nothing_and_the_one_there_goes_on(
    tmp_path: Path, change: Callable[[StudySpec], StudySpec], message: str
) -> None:
    folder, spec = tmp_path / "study", planted.spec()
    work(folder, spec, MOST).store.close()
    before = contents(folder)
    with pytest.raises(ConfigError, match=message):
        open_study(change(spec), planted.DATA, folder, None)
    assert contents(folder) == before
    worker = work(folder, spec)
    rows = read_results(folder / "results.csv")
    assert {row.state for row in rows} == {"done"}
    assert len(rows) == len(planted.finished(spec, planted.planted_loss)[0].cells)
    worker.store.close()


def test_the_storage_of_another_study_is_refused_and_the_new_folder_stays_away(tmp_path: Path) -> None:
    work(tmp_path / "first", planted.spec(), MOST).store.close()
    before = contents(tmp_path / "first")
    storage = f"sqlite:///{tmp_path / 'first' / 'study.sqlite'}"
    with pytest.raises(ConfigError, match="holds the study 'planted', and this one is 'ranks'"):
        open_study(replace(planted.spec(), name="ranks"), planted.DATA, tmp_path / "second", storage)
    assert contents(tmp_path / "first") == before
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("text", ["", "name: [", "- a list"], ids=["empty", "no YAML", "a list"])
def test_a_damaged_study_file_is_one_error_and_stays(tmp_path: Path, text: str) -> None:
    work(tmp_path / "study", planted.spec(), MOST).store.close()
    (tmp_path / "study" / "study.yaml").write_text(text)
    before = contents(tmp_path / "study")
    with pytest.raises(ConfigError, match=r"study\.yaml is damaged: restore it, or choose another --out"):
        open_study(planted.spec(), planted.DATA, tmp_path / "study", None)
    assert contents(tmp_path / "study") == before


def test_what_is_no_study_folder_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="it is no study folder; choose another one"):
        open_study(planted.spec(), planted.DATA, tmp_path, None)
    with pytest.raises(ConfigError, match=r"notes\.txt is a file: name a folder"):
        open_study(planted.spec(), planted.DATA, tmp_path / "notes.txt", None)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(DataError, match="holds no run and no study"):
        write_report(tmp_path)


def test_a_report_of_a_half_finished_study_says_so_and_the_study_goes_on(tmp_path: Path) -> None:
    folder, spec = tmp_path / "study", planted.spec()
    work(folder, spec, MOST).store.close()
    before = contents(folder)
    _, page = write_report(folder)
    assert page.state == "unfinished"
    assert page.verdict.text.startswith(f"No verdict yet: {MOST} of ")
    assert {name: text for name, text in contents(folder).items() if not name.startswith("report.")} == before
    work(folder, spec).store.close()
    assert write_report(folder)[1].state == ""


def test_seeds_that_are_added_after_verdicts_were_seen_are_told(tmp_path: Path) -> None:
    """Only ``auto`` pays for a second look."""
    folder, spec = tmp_path / "study", planted.spec()
    more = replace(spec, seeds=5)
    work(folder, replace(spec, seeds=4), MOST).store.close()
    work(folder, spec).store.close()
    assert "seeds_before: []" in (folder / "study.yaml").read_text(), "nothing had been seen"
    for _ in range(2):
        work(folder, more).store.close()
        assert read_study(folder).spec["seeds_before"] == [3]
    assert read_study(folder).verdicts[0]["seeds"] == 5
    _, page = write_report(folder)
    assert "The seeds were changed after verdicts had been seen (before: 3)." in str(page.sections[-1])
