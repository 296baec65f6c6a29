"""Tokens a CPU second that completions are drawn with, against a bare `generate` of transformers.

    python -m benchmarks.sampling

Same model, prompts, batch and number of new tokens; ours also returns a log-probability with each token, which
`generate` does not. All take turns in an order drawn anew each repetition; a ratio is that within a repetition, so that
what slows both cancels. Time is that of the process on one thread, so that others on the machine count little. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.machine import machine
from benchmarks.timing import interleave, paired_ratio, spread
from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.cli.embedded import MODEL
from lightning_lora.tasks.rl.sampling.in_process import InProcessSampler
from lightning_lora.tasks.rl.sampling.samples import SamplingSettings

BARE = "generate"


def theirs(model: Any, prompts: list[Tensor], group_size: int, new_tokens: int, **settings: Any) -> int:
    """Draw by `generate`; returns the number of tokens."""
    ids = torch.stack(prompts).repeat_interleave(group_size, 0)
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=True, top_k=0, pad_token_id=0, **settings)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return found[:, ids.shape[1] :].numel()


def ours(model: nn.Module, prompts: list[Tensor], group_size: int, new_tokens: int) -> int:
    """Draw by our loop; returns the number of tokens."""
    sampler = InProcessSampler()
    sampler.load(model, 0)
    generator = torch.Generator().manual_seed(0)
    return int(sampler.sample(prompts, group_size, SamplingSettings(new_tokens), generator).lengths.sum())


WAYS: dict[str, Callable[..., int]] = {
    BARE: theirs,
    "generate, static cache": partial(theirs, cache_implementation="static", disable_compile=True),
    "ours, with log-probabilities": ours,
}


def cpu_seconds(draw: Callable[[], int], expected: int) -> float:
    """CPU seconds of the process for a draw of as many tokens as expected."""
    start = time.process_time()
    found = draw()
    seconds = time.process_time() - start
    assert found == expected, f"{found} tokens were drawn, not {expected}"
    return seconds


def measured(
    rows: int, group_size: int, prompt_tokens: int, new_tokens: int, rank: int, repetitions: int, warmups: int
) -> str:
    """A Markdown table of tokens a second, and of ratios to a bare `generate`."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()  # nothing ends a completion: all draw equally many tokens
    if rank:
        inject_lora(model, LoRAConfig(rank=rank))
        model.eval()
    drawn = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prompts = [torch.randint(vocabulary, (prompt_tokens,), generator=drawn) for _ in range(rows // group_size)]
    total = len(prompts) * group_size * new_tokens
    draws = {name: partial(way, model, prompts, group_size, new_tokens) for name, way in WAYS.items()}
    times = interleave({name: partial(cpu_seconds, draw, total) for name, draw in draws.items()}, repetitions, warmups)
    lines = [f"| way | tokens a CPU second | of {BARE} | 10th to 90th percentile |", "|---|---|---|---|"]
    for name, found in times.items():
        ratio = paired_ratio(times[BARE], found)
        speed = f"{total / spread(found).median:,.0f} | {ratio.median:.2f}"
        lines.append(f"| {name} | {speed} | {ratio.p10:.2f} to {ratio.p90:.2f} |")
    about = machine(torch.device("cpu"))
    what = f"{rows} rows in groups of {group_size}, prompts of {prompt_tokens} tokens, {new_tokens} new tokens"
    adapters = f"adapters of rank {rank}" if rank else "no adapters"
    lines += ["", f"{what}, {adapters}, {repetitions} repetitions."]
    lines += [f"{about['cpu']}, {about['threads']} threads, torch {about['versions']['torch']}."]
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8, help="of adapters on the model; 0 for none")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--warmups", type=int, default=1)
    options = vars(parser.parse_args(given))
    torch.set_num_threads(1)
    print(measured(**options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
