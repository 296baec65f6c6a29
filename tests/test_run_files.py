"""What a run and a study really leave in their folders is on the page of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import toys
from tests.support.commands import EMBEDDED, configs, lightning_lora, unlisted_files

ALWAYS = {"config.yaml", "hparams.yaml", "metrics.csv", "curve.csv", "loss.png", "events.jsonl"}
PICTURES = {"capacity.png", "batch_probe.json", "batch_probe.png", "rank_probe.json", "rank_probe.png"}
REPORTS = {"report.html", "report.md", "report.csv"}


@pytest.mark.slow
def test_every_file_of_a_watched_run_is_on_the_page(tmp_path: Path) -> None:
    rank = "--model.init_args.lora.rank=4"
    model = f"--model.init_args.model={toys.save_llama(tmp_path / 'llama', max_position_embeddings=1024)}"
    probe = ["--trainer.callbacks.init_args.at=1", "--trainer.callbacks.init_args.ratios=[0.5,1]"]
    probe += ["--trainer.callbacks.init_args.min_steps=1", "--trainer.callbacks+=lightning_lora.RankProbe"]
    probe += ["--trainer.callbacks.init_args.at=1", "--trainer.callbacks.init_args.min_steps=1"]
    watched = configs("sft.yaml", "lora.yaml", "capacity.yaml", "probe.yaml")
    whole_rows = [option for option in EMBEDDED if "max_length" not in option]
    done = lightning_lora("fit", *watched, *whole_rows, *probe, model, rank, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "sft" / "version_0"
    assert {file.name for file in run.iterdir() if file.is_file()} == ALWAYS | PICTURES | REPORTS
    assert unlisted_files(run) == set()
    (run / "unheard_of.bin").touch()
    assert unlisted_files(run) == {"unheard_of.bin"}
