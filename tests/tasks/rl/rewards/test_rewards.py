"""The rewards that are shipped: what they score, and what they refuse."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

from lightning_lora import LoRAConfig, inject_lora, save_adapter
from lightning_lora.errors import ConfigError
from lightning_lora.tasks.rl.rewards import ExactAnswer, ModelReward, NamedReward, Pattern, RewardPool
from tests.support import tiny_models, toys
from tests.support.tiny_tokenizer import tiny_tokenizer

HERE = "tests.tasks.rl.rewards.rewards_of_a_user"


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("so it is 42.\n#### 42", "6 * 7 = 42\n#### 42", 1.0),
        ("#### 42", "42", 1.0),
        ("#### 41\n no: #### 42.", "#### 42", 1.0),  # the last one counts
        ("#### 42\n no: #### 41", "#### 42", 0.0),
        ("####1,000", "#### 1000", 1.0),
        ("#### $1000.00", "#### 1,000", 1.0),
        ("#### -7", "#### 7", 0.0),
        ("the answer is 42", "#### 42", 0.0),
        ("", "#### 42", 0.0),
    ],
)
def test_the_final_answer_of_gsm8k_is_compared_as_a_number(completion: str, answer: str, reward: float) -> None:
    assert ExactAnswer()(["q"], [completion], answer=[answer]) == [reward]
    messages = [{"role": "assistant", "content": completion}]
    assert ExactAnswer()([[{"role": "user", "content": "q"}]], [messages], answer=[answer]) == [reward]


def test_an_answer_may_be_found_by_another_pattern_in_another_column() -> None:
    reward = ExactAnswer("label", r"<answer>(.*?)</answer>")
    found = reward(["q"] * 3, ["<answer> yes </answer>", "<answer>no</answer>", "yes"], label=["yes"] * 3)
    assert found == [1.0, 0.0, 0.0]


def test_a_pattern_is_found_anywhere_or_must_match_the_whole() -> None:
    texts = ["<think>a\nb</think>c", "x <think></think>", "c"]
    assert Pattern(r"<think>.*</think>")(["q"] * 3, texts) == [1.0, 1.0, 0.0]
    assert Pattern(r"<think>.*</think>.+", whole=True)(["q"] * 3, texts) == [1.0, 0.0, 0.0]


@pytest.mark.slow
def test_rewards_of_ours_work_in_other_processes() -> None:
    pool = RewardPool(ExactAnswer(), workers=1)
    assert pool(["q"] * 2, ["#### 1", "#### 2"], {"answer": ["#### 1", "#### 1"]}) == [1.0, 0.0]
    pool.close()


def test_a_function_is_imported_only_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{HERE}.lengths"
    for allowed in ("", "test", f"{HERE}.length"):
        monkeypatch.setenv("LIGHTNING_LORA_ALLOW", allowed)
        with pytest.raises(ConfigError, match=f"module {HERE} is not allowed.*--allow {HERE}"):
            NamedReward(name)
    monkeypatch.setenv("LIGHTNING_LORA_ALLOW", "numpy tests")
    reward = NamedReward(name)
    assert reward(["p"], ["four"]) == [4.0]
    assert pickle.loads(pickle.dumps(reward))(["p"], ["four"]) == [4.0]
    assert RewardPool(reward, workers=0).name == "lengths"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactAnswer(pattern="("), "'\\(' is no regular expression"),
        (lambda: ExactAnswer(pattern="####"), "needs a group that holds the answer"),
        (lambda: ExactAnswer()(["q"], ["c"], label=["x"]), "the rows have no column 'answer'; they have label"),
        (lambda: Pattern("["), "'\\[' is no regular expression"),
        (lambda: NamedReward("lengths"), "must be the dotted name of a function"),
        (lambda: NamedReward("tests.no_such.reward"), "module tests.no_such cannot be imported"),
        (lambda: NamedReward(f"{HERE}.length"), f"module {HERE} has no function length; did you mean 'lengths'"),
    ],
)
def test_what_cannot_be_a_reward_is_told(make: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_LORA_ALLOW", "tests")
    with pytest.raises(ConfigError, match=message):
        make()


def score_alone(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(model.score(model.model(ids).last_hidden_state[0, -1]))


ROWS = [("two and three?", "five"), ("hi", "a longer answer than the others have"), ("what?", "x")]


def test_a_reward_model_scores_the_last_token_of_each_row(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    settings = tiny_models.llama_config(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(settings).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = ModelReward(str(tmp_path), batch_size=2)
    expected = [score_alone(model, tokenizer, *row) for row in ROWS]
    prompts, completions = zip(*ROWS, strict=True)
    # In this process although workers are asked for, and all rows at once.
    found = RewardPool(reward, workers=2)(prompts, completions, {})
    assert found == pytest.approx(expected, abs=1e-5)
    messages = [[{"role": "assistant", "content": text}] for text in completions]
    assert reward([[{"role": "user", "content": text}] for text in prompts], messages) == found
    assert len(set(found)) == 3


def test_the_adapter_folder_of_a_reward_model_is_loaded_onto_its_base(tmp_path: Path) -> None:
    base = toys.save_llama(tmp_path / "base")
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    inject_lora(model, LoRAConfig(rank=2, trainable=["score"]))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, tmp_path / "adapter")
    reward = ModelReward(str(tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = [score_alone(model.eval(), tokenizer, *row) for row in ROWS]
    prompts, completions = zip(*ROWS, strict=True)
    assert reward(prompts, completions) == pytest.approx(expected, abs=1e-5)


def test_a_model_with_several_outputs_is_no_reward_model(tmp_path: Path) -> None:
    tiny_models.llama_classifier().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 3 outputs; a reward model has one"):
        ModelReward(str(tmp_path))
