"""The demo: both methods learn, and its folder holds what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lightning_lora.cli.embedded import MODEL
from tests.study.report.html_page import HtmlPage
from tests.support import toys
from tests.support.commands import assert_same_logits, lightning_lora

pytestmark = [
    pytest.mark.slow,
    # PEFT asks transformers for a name of the past.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


STEPS = 6
# Each method is trained in a process of its own, which has the imports of the one that starts it. Losses of eight rows
# tell that both learn: on all rows of validation the demo would spend most of its time.
DEMO = """
import functools, sys
from tests.support.warm_server import fork_what_is_spawned
from lightning_lora.cli import demo_arm
from lightning_lora.cli.main import main

demo_arm.SFTDataModule = functools.partial(demo_arm.SFTDataModule, validation_rows=8)
fork_what_is_spawned()
sys.exit(main(["demo", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    where = tmp_path_factory.mktemp("demo")
    done = toys.run_python(DEMO, "--steps", STEPS, "--out", where / "demo")
    return where / "demo", done.stdout


def test_both_methods_learn_from_the_same_start(demo: tuple[Path, str]) -> None:
    lora, full = json.loads((demo[0] / "results.json").read_text())
    assert lora["val_losses"]["0"] == pytest.approx(full["val_losses"]["0"], abs=1e-4)
    for arm in (lora, full):
        assert arm["val_losses"][str(STEPS)] < arm["val_losses"]["0"] - 1
        assert len(arm["train_losses"]) == STEPS
    assert (lora["trainable"], full["trainable"]) == (488_960, 1_878_240)


def test_both_methods_see_the_same_rows_first(demo: tuple[Path, str]) -> None:
    # Adapters start at zero, so the first loss is the base model's in both.
    lora, full = json.loads((demo[0] / "results.json").read_text())
    assert lora["train_losses"][0] == pytest.approx(full["train_losses"][0], abs=1e-4)


def test_adapter_and_merged_model_load_elsewhere_and_agree(demo: tuple[Path, str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(demo[0] / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(demo[0] / "merged").eval()
    tokens = torch.arange(128).reshape(2, 64)
    assert_same_logits(merged(tokens).logits, adapted(input_ids=tokens).logits)


def test_the_report_shows_both_runs_and_claims_no_verdict(demo: tuple[Path, str]) -> None:
    page = HtmlPage((demo[0] / "report.html").read_text())
    heads = [element.text for element in page.all_of("th")]
    assert {"LoRA rank 32", "full"} <= set(heads)
    lora, full = json.loads((demo[0] / "results.json").read_text())
    (verdict,) = (element.text for element in page.all_of("h1"))
    assert all(f"{arm['val_losses'][str(STEPS)]:.4f} " in verdict for arm in (lora, full))
    assert verdict.endswith("one seed each")


def test_the_result_is_told(demo: tuple[Path, str]) -> None:
    for words in ("LoRA rank 32", "full", "trained", "merged and adapter model agree"):
        assert words in demo[1]
    loss, command = f"loss: after {STEPS} steps", f"lightning-lora generate {demo[0] / 'adapter'}"
    for words in (loss, "time: LoRA is", "memory: gradients", command):
        assert words in demo[1]


def test_adapter_and_merged_model_know_where_answers_end(demo: tuple[Path, str]) -> None:
    for name in ("adapter", "merged"):
        assert json.loads((demo[0] / name / "generation_config.json").read_text())["eos_token_id"] == [0, 4]


@pytest.mark.parametrize(("arguments", "words"), [(["--steps", "1"], "at least 3"), (["--out", "here"], "is a file")])
def test_bad_input_is_refused(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "here").write_text("")
    done = lightning_lora("demo", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
