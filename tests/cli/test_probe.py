"""``lightning-lora probe`` takes what ``fit`` takes, prints what it finds, and leaves no trace of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_lora.cli import main as cli
from lightning_lora.files.events import read_events
from lightning_lora.study.batch_probe_result import BatchProbeResult
from tests.support import toys
from tests.support.commands import EMBEDDED, configs, lightning_lora, tree

SMALL = [
    *(setting for setting in EMBEDDED if "max_length" not in setting),
    "--trainer.accumulate_grad_batches=2",
    "--trainer.callbacks+=lightning_lora.callbacks.MergeOnFitEnd",
    "--batch_probe.ratios=[0.5,1]",
    "--batch_probe.min_steps=1",
]


@pytest.mark.slow
def test_a_probe_prints_and_writes_what_it_finds_and_touches_no_run(tmp_path: Path) -> None:
    (run := tmp_path / "runs/sft/version_0").mkdir(parents=True)
    (run / "metrics.csv").write_text("epoch,step\n")
    model = f"--model.init_args.model={toys.save_llama(tmp_path / 'llama', max_position_embeddings=1024)}"
    before = tree(tmp_path)
    done = lightning_lora("probe", *configs("sft.yaml", "lora.yaml"), *SMALL, model, "--batch_probe.at=1", cwd=tmp_path)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "batch probe after step 1: 8 rows to each of 2 batches, loss on 4 held-out rows" in printed
    assert "       8 rows a step,    1 steps: " in printed
    assert "learning rate 0.0003 x 10 = 0.003 for 14 adapters" in printed
    assert printed.count("learning rate 0.0003") == 1, "branches repeat what the run has said"
    after = tree(tmp_path)
    assert {name for name in after if name not in before} == {
        "batch_probe/batch_probe.json",
        "batch_probe/batch_probe.png",
        "batch_probe/events.jsonl",
    }
    assert {name: after[name] for name in before} == before
    result = BatchProbeResult.load(tmp_path / "batch_probe/batch_probe.json")
    events = [event for event in read_events(tmp_path / "batch_probe") if event["event"] != "batch"]
    assert [event["step"] for event in events] == [result.step] == [1]


@pytest.mark.filterwarnings("ignore")
def test_a_probe_beyond_the_run_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])
    assert cli.main(["probe", *configs("sft.yaml", "lora.yaml"), *SMALL]) == 2
    assert "error: at=100 is beyond the run, which has 2 optimizer steps: lower it." in capsys.readouterr().err
    assert tree(tmp_path) == {}
