"""What was planned stands beside what was done, for whole, continued, stopped and distributed runs."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_lora import ConfigError, LoRAConfig
from lightning_lora.callbacks import PlannedRun, planned_run
from lightning_lora.files.events import read_events
from lightning_lora.memory.process_peak import peak_bytes
from lightning_lora.tasks import CausalLM
from tests.support import toys
from tests.support.toys import Toy

pytestmark = toys.expected_warnings


def run(folder: Path, planned: PlannedRun, *others: Callback, ckpt: Path | None = None, **options: Any) -> PlannedRun:
    ticks = iter(range(10_000))
    planned._clock = lambda: float(next(ticks))
    toys.fit(Toy(), folder, ckpt, callbacks=[planned, *others], **options)
    return planned


def lines(caplog: pytest.LogCaptureFixture) -> dict[str, list[str]]:
    text = next(record.message for record in caplog.records if record.message.startswith("planned and measured"))
    return {line[:14].strip(): line[14:].split(maxsplit=2) for line in text.splitlines()[1:]}


def test_a_run_that_went_as_planned_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = sum(p.numel() for p in adapted().parameters() if p.requires_grad)
    with caplog.at_level(logging.INFO):
        planned = run(tmp_path, PlannedRun(4, 8, trained, seconds=2))
    shown = lines(caplog)
    assert shown["steps"] == ["4", "4", "as planned"]
    assert shown["tokens"] == ["8", "8", "as planned"]  # rows: there are no tokens
    assert shown["parameters"] == [str(trained), str(trained), "as planned"]
    assert shown["seconds"] == ["2", "1", "-50%"]
    (event,) = (e for e in read_events(tmp_path) if e["event"] == "planned_and_measured")
    assert event["step"] == 4
    assert event["planned"]["tokens"] == event["measured"]["tokens"] == 8
    assert event["measured"] == planned.measured


def test_a_peak_below_what_was_resident_before_is_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system counts the two apart; a negative number would be told otherwise."""
    peaks = iter((100, 150))
    monkeypatch.setattr(planned_run, "peak_bytes", lambda device: next(peaks))
    monkeypatch.setattr(planned_run, "resident_bytes", lambda: 200)
    assert run(tmp_path, PlannedRun()).measured["peak_bytes"] is None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_a_peak_before_the_run_is_none_of_it(tmp_path: Path) -> None:
    """Neither in this process, nor that of the process that started it."""
    spent = torch.ones(100_000_000)  # 400 MB
    del spent
    earlier = peak_bytes(torch.device("cpu"))
    measured = run(tmp_path, PlannedRun()).measured["peak_bytes"]
    assert earlier is not None
    assert measured is None or measured < 100e6
    now = peak_bytes(torch.device("cpu"))
    assert now is not None
    assert now < earlier - 300e6
    code = "import torch; from lightning_lora.memory.process_peak import peak_bytes as p; print(p(torch.device('cpu')))"
    spent = torch.ones(300_000_000)
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(child.stdout) < 1e9 < spent.nbytes


def adapted() -> Toy:
    module = Toy()
    module.configure_model()
    return module


def test_a_difference_has_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, PlannedRun(4, 8, 1), max_steps=3)
    shown = lines(caplog)
    assert shown["steps"] == ["4", "3", "max_steps is 3"]
    assert shown["tokens"] == ["8", "6", "follows the steps"]
    assert "rank or targets" in shown["parameters"][2]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(tmp_path / "other", PlannedRun(9, 8))
    assert "other data, epochs" in lines(caplog)["steps"][2]


def test_supervised_tokens_of_a_language_model_are_counted(llama_folder: Path, tmp_path: Path) -> None:
    rows = toys.token_rows()
    planned = PlannedRun()
    runner = toys.trainer(tmp_path, callbacks=[planned])
    module = CausalLM(str(llama_folder), lora=LoRAConfig(rank=2))
    runner.fit(module, DataLoader(rows, batch_size=4))  # pyright: ignore[reportArgumentType]
    assert planned.measured["tokens"] == sum(int((row["labels"][1:] != -100).sum()) for row in rows)


def test_a_continued_run_counts_its_earlier_part(tmp_path: Path) -> None:
    first = PlannedRun()
    earlier = toys.fit(Toy(), tmp_path / "a", callbacks=[first], max_steps=2)
    earlier.save_checkpoint(tmp_path / "first.ckpt")
    whole = run(tmp_path / "b", PlannedRun(), ckpt=tmp_path / "first.ckpt", max_epochs=2)
    assert (whole.measured["steps"], whole.measured["tokens"]) == (8, 16)
    assert first.measured["seconds"] is not None
    # The clock of the second part takes a second for a look.
    assert whole.measured["seconds"] == pytest.approx(1 + first.measured["seconds"])


def test_an_earlier_part_that_nobody_counted_is_not_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toys.fit(Toy(), tmp_path / "a", max_steps=2).save_checkpoint(tmp_path / "first.ckpt")
    with caplog.at_level(logging.INFO):
        planned = run(tmp_path / "b", PlannedRun(8, 16), ckpt=tmp_path / "first.ckpt", max_epochs=2)
    assert planned.measured["steps"] == 8
    assert planned.measured["tokens"] is planned.measured["seconds"] is None
    assert lines(caplog)["tokens"][:2] == ["16", "-"]


class Breaks(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("no more")


def test_a_run_that_stops_early_tells_what_it_did(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    planned = PlannedRun(4, 8)
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="no more"):
        run(tmp_path, planned, Breaks())
    shown = lines(caplog)
    assert shown["steps"] == ["4", "2", "the run was stopped"]
    assert shown["tokens"][1] == "4"
    assert next(iter(read_events(tmp_path)))["stopped"]


def test_negative_plans_are_refused() -> None:
    with pytest.raises(ConfigError, match="tokens of PlannedRun must not be negative, got -1"):
        PlannedRun(tokens=-1)


RANKS = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from lightning_lora.callbacks import PlannedRun
from lightning_lora.files.events import read_events
from lightning_lora.memory.process_peak import peak_bytes
from tests.support import toys
planned = PlannedRun(2, 8)
runner = toys.trainer(Path(sys.argv[1]), callbacks=[planned], devices=2, strategy="ddp")
runner.fit(toys.Toy(), toys.loader())
assert planned.measured["steps"] == 2 and planned.measured["tokens"] == 8, planned.measured
if runner.is_global_zero:
    assert len([e for e in read_events(Path(sys.argv[1])) if e["event"] == "planned_and_measured"]) == 1
"""


@pytest.mark.slow
def test_tokens_of_all_processes_count(tmp_path: Path) -> None:
    toys.run_python(RANKS, tmp_path, ranks=2)
