"""``lightning-lora probe`` takes what ``fit`` takes, prints what it finds, and leaves no trace of a run.

With ``--rank`` it tries more rank.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_lora.cli import main as cli
from lightning_lora.files.events import read_events
from lightning_lora.study.batch_probe_result import BatchProbeResult
from lightning_lora.study.rank_probe_result import RankProbeResult
from tests.support import toys
from tests.support.commands import EMBEDDED, configs, lightning_lora
from tests.support.toys import tree

RUN = [
    *(setting for setting in EMBEDDED if "max_length" not in setting),
    "--trainer.accumulate_grad_batches=2",
    "--trainer.callbacks+=lightning_lora.callbacks.MergeOnFitEnd",
]
SMALL = [*RUN, "--batch_probe.ratios=[0.5,1]", "--batch_probe.min_steps=1"]


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


@pytest.mark.slow
def test_a_probe_of_the_rank_prints_and_writes_what_it_finds_and_nothing_else(tmp_path: Path) -> None:
    model = f"--model.init_args.model={toys.save_llama(tmp_path / 'llama', max_position_embeddings=1024)}"
    options = ["--rank", "--rank_probe.at=1", "--rank_probe.min_steps=1", "--model.init_args.lora.rank=2"]
    done = lightning_lora("probe", *configs("sft.yaml", "lora.yaml"), *RUN, model, *options, cwd=tmp_path)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "rank probe after step 1: 1 steps of 8 rows at each rank, loss on 4 held-out rows" in printed
    assert "  rank    4: " in printed
    made = {name for name in tree(tmp_path) if not name.startswith("llama")}
    assert made == {"rank_probe/rank_probe.json", "rank_probe/rank_probe.png", "rank_probe/events.jsonl"}
    result = RankProbeResult.load(tmp_path / "rank_probe/rank_probe.json")
    assert (result.rank, result.grown_rank, result.step) == (2, 4, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "--rank_probe.at=100"], "at=100 is beyond the run, which has 2 optimizer steps: lower it."),
        (["--rank", "--rank_probe.factor=1"], "factor must be at least 2, got 1."),
        (["--rank", "--batch_probe.at=1"], "batch_probe.at is a setting of the other probe: drop it, or drop --rank."),
        (["--rank_probe.at=1"], "rank_probe.at is a setting of the other probe: add --rank."),
        (
            ["--rank", "--trainer.callbacks+=lightning_lora.RankProbe"],
            "the config has a RankProbe of its own: remove it, or run `fit`, where it works.",
        ),
    ],
)
def test_a_probe_of_the_rank_refuses_bad_input(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])
    assert cli.main(["probe", *configs("sft.yaml", "lora.yaml"), *RUN, *options]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert tree(tmp_path) == {}
