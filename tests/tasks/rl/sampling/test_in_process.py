"""Completions of the model that is trained: what they are, and that their log-probabilities are the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.errors import ConfigError
from lightning_lora.tasks.rl.sampling.in_process import InProcessSampler
from lightning_lora.tasks.rl.sampling.samples import Samples, SamplingSettings
from tests.support import tiny_models
from tests.support.tiny_tokenizer import tiny_tokenizer

PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([9, 8, 7, 6, 5, 4, 3]), torch.tensor([11])]

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def adapted(model: nn.Module) -> nn.Module:
    inject_lora(model, LoRAConfig(rank=8))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def mistral() -> nn.Module:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(vocab_size=tiny_models.VOCAB, num_key_value_heads=2, sliding_window=4, eos_token_id=2, **SHAPE)
    )


MODELS = {
    "llama": tiny_models.llama,
    "gpt2": tiny_models.gpt2,  # learned positions
    "mistral": mistral,  # a sliding window
}


def sampled(
    model: nn.Module, group_size: int = 4, prompts: list[Tensor] = PROMPTS, seed: int = 0, **settings: Any
) -> Samples:
    sampler = InProcessSampler()
    sampler.load(model, 7)
    asked = SamplingSettings(**{"max_new_tokens": 12, **settings})
    return sampler.sample(prompts, group_size, asked, torch.Generator().manual_seed(seed))


def rows_of(samples: Samples, prompts: list[Tensor], group_size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Prompt, completion and log-probabilities of each row."""
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    parts = zip(repeated, samples.tokens, samples.logprobs, samples.lengths.tolist(), strict=True)
    return [(prompt, tokens[:length], logprobs[:length]) for prompt, tokens, logprobs, length in parts]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("kind", MODELS)
def test_log_probabilities_are_those_of_a_full_forward_pass(kind: str, temperature: float) -> None:
    model = adapted(MODELS[kind]())
    samples = sampled(model, temperature=temperature)
    assert samples.version == 7
    for prompt, tokens, logprobs in rows_of(samples, PROMPTS, 4):
        with torch.no_grad():
            logits = model(torch.cat([prompt, tokens]).unsqueeze(0), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
    # Rows have ended at different steps, so that some were dropped while others went on.
    assert len(samples.lengths.unique()) > 2
    assert not samples.logprobs.requires_grad


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_completions_are_those_of_transformers(kind: str) -> None:
    model: Any = adapted(MODELS[kind]())
    samples = sampled(model, group_size=2, temperature=0.0)
    for prompt, tokens, _ in rows_of(samples, PROMPTS, 2):
        whole = model.generate(prompt.unsqueeze(0), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert tokens.tolist() == whole[0, len(prompt) :].tolist()


def test_a_model_that_keeps_a_state_is_sampled_from_too() -> None:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=tiny_models.VOCAB, num_key_value_heads=2, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"], eos_token_id=2, head_dim=8, **SHAPE,
    )  # fmt: skip
    model: Any = Qwen3NextForCausalLM(config).eval()
    prompts = [PROMPTS[1], PROMPTS[1].flip(0)]
    samples = sampled(model, group_size=2, temperature=0.0, prompts=prompts)
    for prompt, tokens, _ in rows_of(samples, prompts, 2):
        whole = model.generate(prompt.unsqueeze(0), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert tokens.tolist() == whole[0, len(prompt) :].tolist()


def test_a_completion_ends_at_the_first_end_token() -> None:
    model = adapted(tiny_models.llama())
    samples = sampled(model, group_size=16, seed=3)
    ended = [tokens.tolist() for _, tokens, _ in rows_of(samples, PROMPTS, 16)]
    assert samples.finished.tolist() == [tokens[-1] == 2 for tokens in ended]
    assert not any(2 in tokens[:-1] for tokens in ended)
    assert {len(tokens) for tokens in ended if tokens[-1] != 2} == {12}
    assert 0 < samples.finished.sum() < 48
    padding = torch.arange(samples.tokens.shape[1]) >= samples.lengths.unsqueeze(-1)
    assert not samples.logprobs[padding].any()


def test_a_row_does_not_depend_on_when_the_others_end() -> None:
    model: Any = adapted(tiny_models.llama())
    stopped = rows_of(sampled(model, group_size=16), PROMPTS, 16)
    model.generation_config.eos_token_id = None
    free = rows_of(sampled(model, group_size=16), PROMPTS, 16)
    assert {len(tokens) for _, tokens, _ in free} == {12}
    for (_, before, _), (_, after, _) in zip(free, stopped, strict=True):
        assert before[: len(after)].tolist() == after.tolist()


def test_the_generator_decides_what_is_drawn() -> None:
    model = adapted(tiny_models.llama())
    first = sampled(model, seed=5).tokens
    assert torch.equal(first, sampled(model, seed=5).tokens)
    assert not torch.equal(first, sampled(model, seed=6).tokens)
    assert len({tuple(row) for row in first[:4].tolist()}) > 1


def test_the_context_of_the_model_ends_a_completion() -> None:
    model = adapted(tiny_models.gpt2(n_positions=8))
    samples = sampled(model, max_new_tokens=20, prompts=PROMPTS)
    room = torch.tensor([5, 1, 7]).repeat_interleave(4)
    assert (samples.lengths <= room).all()
    assert (samples.lengths[~samples.finished] == room[~samples.finished]).all()


def test_modes_and_random_numbers_stay_as_they_were() -> None:
    model = adapted(tiny_models.llama(attention_dropout=0.5))
    expected = sampled(model).tokens
    model.train()
    list(model.modules())[3].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert torch.equal(sampled(model).tokens, expected)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_checkpointing_does_not_switch_the_cache_off() -> None:
    model: Any = adapted(tiny_models.llama())
    expected = sampled(model).tokens
    turn_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    turn_on()
    model.train()
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, _, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(sampled(model).tokens, expected)
    assert lengths == [7, *[1] * (expected.shape[1] - 1)]


def test_a_stop_text_ends_a_completion_and_stays_in_it() -> None:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = adapted(tiny_models.llama(vocab_size=len(tokenizer), eos_token_id=None))
    sampler = InProcessSampler(tokenizer)
    sampler.load(model, 0)
    settings = SamplingSettings(max_new_tokens=40)

    def texts(settings: SamplingSettings) -> tuple[list[str], Samples]:
        samples = sampler.sample(PROMPTS, 4, settings, torch.Generator().manual_seed(0))
        rows = rows_of(samples, PROMPTS, 4)
        return [str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False)) for _, tokens, _ in rows], samples

    free, _ = texts(settings)
    stop = free[0][3:6]
    stopped, samples = texts(SamplingSettings(max_new_tokens=40, stop=(stop,)))
    assert stopped[0].endswith(stop)
    assert samples.finished[0]
    for before, after in zip(free, stopped, strict=True):
        assert before.startswith(after)
        assert after == before if stop not in before else after.startswith(before[: before.index(stop) + len(stop)])


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "there are no prompts to sample from"),
        ([torch.tensor([], dtype=torch.int64)], {}, "prompt 0 of the batch has no tokens"),
        ([PROMPTS[0], torch.arange(24)], {}, "prompt 1 of the batch has 24 tokens, and the context of the model is 24"),
        (PROMPTS, {"stop": ("x",)}, "stop texts need a tokenizer"),
    ],
)
def test_what_cannot_be_sampled_is_told(prompts: list[Tensor], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampled(tiny_models.gpt2(), prompts=prompts, **settings)


def test_a_sampler_without_a_model_is_told() -> None:
    with pytest.raises(ConfigError, match="the sampler has no model: call load first"):
        InProcessSampler().sample(PROMPTS, 1, SamplingSettings(), torch.Generator())
