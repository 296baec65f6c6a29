"""Checkpoints of tasks: read by another process, and resumed exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_lora.callbacks import LoRAGuard
from lightning_lora.tasks import CausalLM, SequenceClassifier
from tests.support import toys
from tests.tasks.conftest import StopAfterEpoch, fit, make
from tests.tasks.test_sequence_classifier import fit as fit_classifier
from tests.tasks.test_sequence_classifier import make as classifier

pytestmark = toys.expected_warnings


RELOAD = """
import sys, torch, warnings
warnings.simplefilter("error")
from lightning_lora import tasks
for kind in ("CausalLM", "SequenceClassifier"):
    module = getattr(tasks, kind).load_from_checkpoint(f"{sys.argv[1]}/{kind}.ckpt", weights_only=True)
    torch.save(module.state_dict(), f"{sys.argv[1]}/{kind}.pt")
"""


@pytest.mark.filterwarnings("ignore:Some weights of .* were not initialized")
def test_reload_in_a_fresh_process(llama_folder: Path, tmp_path: Path) -> None:
    modules = {CausalLM: make(llama_folder), SequenceClassifier: classifier(llama_folder)}
    fit(modules[CausalLM], tmp_path).save_checkpoint(tmp_path / "CausalLM.ckpt")
    fit_classifier(modules[SequenceClassifier], tmp_path).save_checkpoint(tmp_path / "SequenceClassifier.ckpt")
    for kind, in_full in {CausalLM: [], SequenceClassifier: ["model.score.weight"]}.items():
        kept = torch.load(tmp_path / f"{kind.__name__}.ckpt", weights_only=True)["state_dict"]
        assert [name for name in kept if "lora_" not in name] == in_full
        assert len(kept) == 28 + len(in_full)
    toys.run_python(RELOAD, tmp_path)
    for kind, module in modules.items():
        assert toys.same(toys.snapshot(module), torch.load(tmp_path / f"{kind.__name__}.pt", weights_only=True))


def test_resuming_equals_the_uninterrupted_run(llama_folder: Path, tmp_path: Path) -> None:
    whole, half, resumed = (make(llama_folder, schedule="cosine", warmup_steps=1) for _ in range(3))
    torch.manual_seed(0)
    fit(whole, tmp_path, max_epochs=2)
    torch.manual_seed(0)

    fit(half, tmp_path, max_epochs=2, callbacks=[StopAfterEpoch()]).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))


def test_full_fine_tuning_is_the_same_module_without_lora(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, lora=None)
    runner = fit(module, tmp_path, callbacks=[LoRAGuard()])
    runner.save_checkpoint(tmp_path / "full.ckpt")
    kept = torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]
    assert kept.keys() == module.state_dict().keys()
    loaded = CausalLM.load_from_checkpoint(tmp_path / "full.ckpt", weights_only=True)
    assert toys.same(toys.snapshot(module), toys.snapshot(loaded))
