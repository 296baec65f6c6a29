"""``fit`` with the configs that watch the batch size, as docs/understand/monitors.md shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora.files.events import read_events
from lightning_lora.study.batch_probe_result import BatchProbeResult
from tests.support import toys
from tests.support.commands import EMBEDDED, configs, lightning_lora

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("overlay", ["monitor.yaml", "probe.yaml"])
def test_a_watched_run_ends_with_the_state_of_its_batch_in_two_lines(overlay: str, tmp_path: Path) -> None:
    model = f"--model.init_args.model={toys.save_llama(tmp_path / 'llama', max_position_embeddings=1024)}"
    settings = [setting for setting in EMBEDDED if "max_length" not in setting]
    # The first 50 steps are not measured: 60 steps in all.
    small = ["--data.init_args.batch_size=2", "--trainer.max_epochs=10", "--trainer.check_val_every_n_epoch=10"]
    if overlay == "probe.yaml":
        small = ["--trainer.callbacks.init_args.at=1", "--trainer.callbacks.init_args.ratios=[0.5,1]"]
        small += ["--trainer.callbacks.init_args.min_steps=1"]
    done = lightning_lora("fit", *configs("sft.yaml", "lora.yaml", overlay), *settings, *small, model, cwd=tmp_path)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    lines = printed.splitlines()
    (state,) = (
        place for place, line in enumerate(lines) if line.startswith("batch size: step-starved (effective batch")
    )
    assert "optimizer steps are few whatever the noise: " in lines[state + 1]
    (run,) = tmp_path.glob("runs/sft/version_0")
    events = list(read_events(run))
    assert [event["event"] for event in events[:2]] in (["started", "batch"], ["batch", "started"])
    if overlay == "monitor.yaml":
        assert (run / "batch_size.png").is_file()
        assert "gns/value" in (run / "metrics.csv").read_text().splitlines()[0]
    else:
        assert BatchProbeResult.load(run / "batch_probe.json").step == 1


def test_a_run_that_watches_capacity_ends_with_a_verdict_and_its_picture(tmp_path: Path) -> None:
    files = configs("sft.yaml", "lora.yaml", "capacity.yaml")
    model = f"--model.init_args.model={toys.save_llama(tmp_path / 'llama', max_position_embeddings=1024)}"
    done = lightning_lora("fit", *files, *EMBEDDED, model, "--trainer.max_epochs=6", cwd=tmp_path)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    (run,) = tmp_path.glob("runs/sft/version_0")
    (end,) = (event for event in read_events(run) if event["event"] == "capacity_verdict")
    assert end["sentence"] in printed
    assert end["groups"]
    assert (run / "capacity.png").is_file()
    assert "capacity/" in (run / "metrics.csv").read_text().splitlines()[0]
