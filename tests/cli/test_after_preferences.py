"""What can be done with a run of preferences or rewards from the command line, before it and after it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_lora.cli import main as cli
from lightning_lora.cli.embedded import MODEL
from tests.tasks.rl import policies

pytestmark = [
    *policies.EXPECTED,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

REWARDS = """
import time

def short(completions, **columns):
    return [-len(completion) / 100 for completion in completions]

def compare(prompts, completions, answer, **columns):
    assert len(prompts) == len(answer) == 4, "not all rows of a batch"
    return [float(len(completion) - min(map(len, completions))) for completion in completions]

compare.sees_all_rows = True

def hang(prompts, completions, **columns):
    time.sleep(60)
"""
NAMED = "lightning_lora.tasks.rl.rewards.NamedReward"
OPTIONS: dict[str, list[str]] = {
    "DPO": ["--data", "PreferenceDataModule", "--data.train", "pairs.jsonl"],
    "RewardModel": ["--data", "PreferenceDataModule", "--data.train", "pairs.jsonl"],
    "PolicyGradient": ["--data", "PromptDataModule", "--data.train", "prompts.jsonl"],
}
POLICY = ["--model.group_size=4", "--model.max_new_tokens=3", "--model.reward_workers=0"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pairs = [{"prompt": f"{n}?", "chosen": f"It is {2 * n}.", "rejected": "No."} for n in range(5)]
    prompts = [{"question": f"What is {n}?", "answer": str(n)} for n in range(4)]
    for name, rows in {"pairs": pairs, "prompts": prompts}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards_beside.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setenv("LIGHTNING_LORA_ALLOW", "")
    monkeypatch.delitem(sys.modules, "rewards_beside", raising=False)
    return tmp_path


def command(name: str, task: str, *more: str) -> int:
    base = [f"--model=lightning_lora.tasks.{task}", f"--model.model={MODEL}", "--model.lora.rank=2"]
    data = [
        word.replace("Pre", "lightning_lora.data.Pre").replace("Prompt", "lightning_lora.data.Prompt")
        for word in OPTIONS[task]
    ]
    short = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.default_root_dir=run"]
    is_policy = task == "PolicyGradient"
    reward = [] if any("reward" in word for word in more) else ["--model.reward=rewards_beside.short"]
    allowed = ["--allow", "rewards_beside"] if is_policy else []
    own = [*POLICY, *reward] if is_policy else []
    return cli.main([*allowed, name, *base, *data, "--data.batch_size=1", *own, *short, *more])


@pytest.mark.parametrize(
    ("task", "more"), [*((task, ()) for task in OPTIONS), ("PolicyGradient", ("--model.advantage=gae",))]
)
def test_a_run_is_exported_inspected_and_asked(
    task: str, more: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("fit", task, *more) == 0
    capsys.readouterr()
    for what, out in (["export", "peft"], ["export", "merged"], ["inspect", ""]):
        options = [out, "--format", out] if out else []
        assert cli.main([what, "run", *options]) == 0, capsys.readouterr().err
    auto: Any = AutoModelForSequenceClassification if task == "RewardModel" else AutoModelForCausalLM
    auto.from_pretrained("merged")
    assert not [name for name in load_file("peft/adapter_model.safetensors") if "value_head" in name]
    code = cli.main(["generate", "run", "--prompt", "Hi", "--max_new_tokens=2"])
    told = capsys.readouterr().err
    assert (code, "was written by" in told) == ((2, True) if task == "RewardModel" else (0, False))
    assert "adapter folder works" not in told


def test_a_run_of_full_fine_tuning_is_exported_as_a_whole_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("fit", "PolicyGradient", "--model.lora=null") == 0
    assert cli.main(["export", "run", "peft"]) == 2
    assert "it holds no adapter. Write the whole model with --format merged" in capsys.readouterr().err
    assert cli.main(["export", "run", "merged", "--format", "merged"]) == 0, capsys.readouterr().err
    (checkpoint,) = Path("run").glob("**/*.ckpt")
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, tensor in AutoModelForCausalLM.from_pretrained("merged").named_parameters():
        assert torch.equal(tensor, trained[f"model.{name}"])


@pytest.mark.parametrize("task", OPTIONS)
def test_data_is_shown_and_the_run_planned_before_it(
    task: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("preview", task) == 0
    shown = capsys.readouterr().out
    assert ("4 prompts" in shown and "answer: '0'" in shown) or "chosen" in shown
    assert command("plan", task, "--memory=8GiB", "--json=plan.json") == 0
    planned = capsys.readouterr().out
    assert ("not traced" in planned) == (task == "PolicyGradient")
    assert "KeyError" not in planned


@pytest.mark.parametrize("how", ["by name", "by class"])
def test_a_reward_that_compares_rows_sees_all_of_them(how: str, folder: Path) -> None:
    named = [f"--model.reward={NAMED}", "--model.reward.function"]
    reward = {"by name": ["--model.reward=rewards_beside.compare"], "by class": [*named, "rewards_beside.compare"]}
    with pytest.warns(UserWarning, match="reward_workers=1 has no effect: the reward is called in this process"):
        assert command("fit", "PolicyGradient", *reward[how], "--model.reward_workers=1") == 0


def test_a_reward_that_hangs_is_told_in_one_message_or_worth_what_was_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hang = ["--model.reward=rewards_beside.hang", "--model.reward_workers=2", "--model.reward_timeout=0.2"]
    assert command("fit", "PolicyGradient", *hang) == 1
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "took more than 0.2 seconds" in told
    pool = ["--model.reward=lightning_lora.tasks.rl.rewards.RewardPool", "--model.reward.reward=rewards_beside.hang"]
    pool += ["--model.reward_workers=2", "--model.reward.workers=2"]  # the default: the pool has its own
    pool += ["--model.reward.timeout=0.2", "--model.reward.on_timeout=-1.0"]
    assert command("fit", "PolicyGradient", *pool) == 0


def test_a_reward_whose_module_is_not_allowed_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("fit", "PolicyGradient", "--model.reward=rewards_of_others.short")
    assert "lightning-lora --allow" in capsys.readouterr().err
    named = [f"--model.reward={NAMED}", "--model.reward.function=rewards_of_others.short"]
    assert command("fit", "PolicyGradient", *named) == 2
    assert "lightning-lora --allow" in capsys.readouterr().err
