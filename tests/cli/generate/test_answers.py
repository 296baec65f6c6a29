"""What generated text must be: that of a plain loop over the model, whatever is batched, cached or switched off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_lora import disable_lora, load_adapter, merge_lora
from lightning_lora.cli.embedded import MODEL, VALIDATION
from lightning_lora.cli.generate.answers import Answer, encode_prompts, generate
from lightning_lora.cli.generate.decoding import Sampling
from lightning_lora.data.encoding import encode
from lightning_lora.data.prompts.prompt_tokens import prompt_ids
from lightning_lora.data.records import Conversation, Text
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import ConfigError, DataError
from tests.support.tiny_tokenizer import MARKED, SPOKEN, UNMARKED, tiny_tokenizer

SETTINGS = RowSettings(max_length=1024)
SHORT = Sampling(max_new_tokens=16)


def asked(*texts: str) -> list[Conversation]:
    return [Conversation(f"row {i}", [{"role": "user", "content": text}]) for i, text in enumerate(texts)]


QUESTIONS = [json.loads(line)["question"] for line in VALIDATION.read_text().splitlines()[:3]]
PROMPTS = asked("Hi", *QUESTIONS, "What is 2 + 3?")


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def by_hand(model: Any, ids: list[int], most: int, stops: set[int]) -> list[int]:
    """The most probable tokens, one by one, from the logits of the whole text so far."""
    written: list[int] = []
    while len(written) < most and not (written and written[-1] in stops):
        with torch.no_grad():
            written.append(int(model(torch.tensor([[*ids, *written]]), use_cache=False).logits[0, -1].argmax()))
    return written


@pytest.fixture(scope="module")
def answers(tuned: Any, tokenizer: Any) -> list[Answer]:
    """What the tuned model says to all prompts, in one batch."""
    return generate(tuned, tokenizer, PROMPTS, SETTINGS, SHORT)


def test_answers_are_those_of_a_plain_loop_over_the_logits(tuned: Any, tokenizer: Any, answers: list[Answer]) -> None:
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        written = by_hand(tuned, prompt_ids(tokenizer, [prompt], SETTINGS)[0], 16, {0, 4})
        assert answer.tokens == len(written)
        assert answer.text == tokenizer.decode(written[:-1] if written[-1] in (0, 4) else written)


@pytest.mark.parametrize("size", [1, 2])
def test_batches_of_any_size_give_the_same_answers(
    size: int, tuned: Any, tokenizer: Any, answers: list[Answer]
) -> None:
    assert generate(tuned, tokenizer, PROMPTS, SETTINGS, Sampling(16, batch_size=size)) == answers
    assert len(set(texts(answers))) > 1


def test_the_cache_changes_nothing(tuned: Any, tokenizer: Any, answers: list[Answer]) -> None:
    assert generate(tuned, tokenizer, PROMPTS, SETTINGS, Sampling(16, use_cache=False)) == answers


def test_with_adapters_off_the_answers_are_those_of_the_plain_base(
    base: Any, tuned: Any, tokenizer: Any, answers: list[Answer]
) -> None:
    expected = generate(base, tokenizer, PROMPTS, SETTINGS, SHORT)
    with disable_lora(tuned):
        assert generate(tuned, tokenizer, PROMPTS, SETTINGS, SHORT) == expected
    assert generate(tuned, tokenizer, PROMPTS, SETTINGS, SHORT) == answers != expected


def test_the_merged_model_gives_the_same_answers(adapter: Path, tokenizer: Any, answers: list[Answer]) -> None:
    merged = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    load_adapter(merged, adapter)
    merge_lora(merged)
    assert generate(merged, tokenizer, PROMPTS, SETTINGS, SHORT) == answers


def test_an_answer_stops_where_the_template_ends_a_turn_even_if_the_model_does_not_know(tokenizer: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = 0
    prompts = asked("Hi", QUESTIONS[0])
    for prompt, answer in zip(prompts, generate(model, tokenizer, prompts, SETTINGS, Sampling(60)), strict=True):
        ids = prompt_ids(tokenizer, [prompt], SETTINGS)[0]
        written = by_hand(model, ids, 60, {4})
        assert written[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
        assert (answer.stop, answer.tokens) == ("end of turn", len(written))
        assert "<|" not in answer.text


def test_an_answer_that_is_cut_says_so(base: Any, tokenizer: Any) -> None:
    (cut,) = generate(base, tokenizer, asked(QUESTIONS[0]), SETTINGS, Sampling(2))
    assert (cut.stop, cut.tokens) == ("max_new_tokens", 2)


def test_settings_in_the_models_own_generation_config_are_not_used(
    tuned: Any, tokenizer: Any, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tuned.generation_config.__class__(
        do_sample=True, temperature=3.0, repetition_penalty=1.9, max_length=7, min_new_tokens=9, eos_token_id=[0, 4]
    )
    monkeypatch.setattr(tuned, "generation_config", own)
    assert generate(tuned, tokenizer, PROMPTS, SETTINGS, SHORT) == answers
    assert tuned.generation_config is own


def test_draws_come_from_the_seed_and_leave_other_draws_alone(tuned: Any, tokenizer: Any) -> None:
    def drawn(seed: int) -> list[str]:
        return texts(generate(tuned, tokenizer, PROMPTS, SETTINGS, Sampling(8, temperature=1.5, seed=seed)))

    before = torch.get_rng_state()
    first = drawn(1)
    assert drawn(1) == first != drawn(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(tuned: Any, tokenizer: Any, answers: list[Answer]) -> None:
    for sampling in (Sampling(16, temperature=2.0, top_k=1), Sampling(16, temperature=2.0, top_p=1e-6)):
        assert generate(tuned, tokenizer, PROMPTS, SETTINGS, sampling) == answers


def test_a_prompt_longer_than_the_context_is_named(tuned: Any, tokenizer: Any) -> None:
    prompts = asked("Hi", "word " * 2000)
    with pytest.raises(DataError, match=r"row 1: the prompt has \d{4} tokens, and the context of the model is 1024"):
        generate(tuned, tokenizer, prompts, SETTINGS, SHORT)


def test_a_context_that_is_scaled_counts_whole_as_in_training(
    tuned: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Conversation("row 1", [{"role": "user", "content": "a b " * 800}])
    scaled = {**tuned.config.rope_parameters, "factor": 4.0, "original_max_position_embeddings": 1024}
    monkeypatch.setattr(tuned.config, "rope_parameters", scaled)
    (ids,) = encode_prompts(tuned, tokenizer, [long], RowSettings(max_length=1024))
    assert 1024 < len(ids) < 4096


def test_a_full_context_ends_one_answer_and_not_its_neighbours(tuned: Any, tokenizer: Any) -> None:
    plain = prompt_ids(tokenizer, asked(""), SETTINGS)[0]
    word = tokenizer(" 1", add_special_tokens=False)["input_ids"]
    long = asked(" 1" * ((1020 - len(plain)) // len(word)))[0]
    room = 1024 - len(prompt_ids(tokenizer, [long], SETTINGS)[0])
    together = generate(tuned, tokenizer, [PROMPTS[1], long, PROMPTS[2]], SETTINGS, SHORT)
    assert (together[1].stop, together[1].tokens) == ("context", room)
    assert 0 < room < 16
    assert [together[0], together[2]] == generate(tuned, tokenizer, [PROMPTS[1], PROMPTS[2]], SETTINGS, SHORT)


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("template", [MARKED, UNMARKED, SPOKEN, "{{ bos_token }}" + MARKED, None])
def test_prompts_are_what_stood_before_the_answer_in_training(template: str | None, starts: bool) -> None:
    tokenizer = tiny_tokenizer(template, starts=starts)
    settings = RowSettings(max_length=1024, prompt_separator="\n")
    question, answer = {"role": "user", "content": "two and three?"}, {"role": "assistant", "content": "five."}
    ((row,),) = encode(tokenizer, [Conversation("row", [question, answer])], settings)  # pyright: ignore
    before = row.ids[: int(row.supervised.argmax())].tolist()
    assert prompt_ids(tokenizer, [Conversation("row", [question])], settings) == [before]
    assert before.count(tokenizer.bos_token_id) <= 1


def test_a_text_is_continued_after_the_begin_token_of_training() -> None:
    tokenizer = tiny_tokenizer(starts=True)
    ((row,),) = encode(tokenizer, [Text("row", "two and three")], SETTINGS)  # pyright: ignore
    assert prompt_ids(tokenizer, [Text("row", "two and three")], SETTINGS) == [row.ids[:-1].tolist()]


def test_variables_of_settings_and_of_the_row_reach_the_template() -> None:
    template = "{{ tools[0].name }}/{{ a }}/{{ b }}/{{ c }}/" + UNMARKED
    tokenizer = tiny_tokenizer(template)
    settings = RowSettings(max_length=64, chat_template_kwargs={"a": "one", "b": "two"})
    record = Conversation(
        "row", [{"role": "user", "content": "x"}], variables={"tools": [{"name": "t"}], "b": "2", "c": "3"}
    )
    (ids,) = prompt_ids(tokenizer, [record], settings)
    assert str(tokenizer.decode(ids)).startswith("t/one/2/3/")


def test_a_template_of_the_settings_decides_prompt_and_end(base: Any) -> None:
    tokenizer = tiny_tokenizer(MARKED)
    settings = RowSettings(max_length=64, chat_template=SPOKEN)
    (ids,) = prompt_ids(tokenizer, asked("hello"), settings)
    assert tokenizer.decode(ids) == "user: hello\n\nassistant:"


def test_turns_without_a_template_are_refused_and_name_the_row() -> None:
    tokenizer = tiny_tokenizer(None)
    record = Conversation("data.jsonl, row 7", [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    with pytest.raises(DataError, match=r"data.jsonl, row 7: the tokenizer has no chat template"):
        prompt_ids(tokenizer, [record], SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"temperature": -1.0}, "temperature must be a finite number"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0"),
        ({"temperature": 1.0, "top_k": -1}, "top_k must be"),
        ({"top_p": 0.9}, "temperature 0 draws none"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampling(**wrong)


def test_a_stopped_answer_is_interrupted_not_ended(tuned: Any, tokenizer: Any) -> None:
    def enough(tokens: torch.Tensor) -> bool:
        written.extend(tokens.tolist())
        return len(written) == 3

    written: list[int] = []
    (answer,) = generate(tuned, tokenizer, asked(QUESTIONS[0]), SETTINGS, SHORT, enough)
    assert (answer.stop, answer.tokens) == ("interrupted", 3)


def test_a_stop_text_ends_an_answer_and_stays_in_it(tuned: Any, tokenizer: Any, answers: list[Answer]) -> None:
    stop = answers[0].text[4:7]
    for answer, free in zip(
        generate(tuned, tokenizer, PROMPTS, SETTINGS, Sampling(16, stop=(stop,))), answers, strict=True
    ):
        if stop in free.text:
            assert answer.stop == "stop text"
            assert answer.text.startswith(free.text[: free.text.index(stop) + len(stop)])
            assert answer.tokens <= free.tokens
        else:
            assert answer == free


THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% if loop.last %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
    "{{ m.content }}<|end|>{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinks is defined and not thinks %}<think></think>{% endif %}"
    "{% endif %}"
)
"""Drops the thinking of earlier turns, and opens an empty one in the prompt where it is to be left out."""


@pytest.mark.parametrize("template", [MARKED, UNMARKED, SPOKEN, THINKING])
@pytest.mark.parametrize("variables", [{}, {"thinks": False}])
def test_the_prompt_of_a_later_turn_is_that_of_its_training_row(template: str, variables: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer(template)
    settings = RowSettings(max_length=1024, chat_template_kwargs=variables if template is THINKING else {})
    first = {"role": "assistant", "content": "five."}
    if template is THINKING and not variables:
        first["reasoning_content"] = "2+3"
    turns = [{"role": "user", "content": "two and three?"}, first, {"role": "user", "content": "sure?"}]
    (rows,) = encode(tokenizer, [Conversation("row", [*turns, {"role": "assistant", "content": "yes"}])], settings)
    assert not isinstance(rows, Exception)
    row = rows[-1]
    starts = [i for i, trained in enumerate(row.supervised) if trained and not row.supervised[i - 1]]
    assert prompt_ids(tokenizer, [Conversation("row", turns)], settings) == [row.ids[: starts[-1]].tolist()]
