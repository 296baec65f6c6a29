"""LoRA-DPO on one model against DPO with a second one: peak memory of a step, and the cost of the reference pass.

    python -m benchmarks.preferences --model lightning_lora/assets/tiny-base

One process, one batch of random pairs, float32. Peaks are of the third step, base weights and optimizer state included.
Times are CPU seconds of the process, interleaved; the table gives paired ratios (10th percentile, median, 90th).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.machine import load, machine
from benchmarks.memory import peak_on_cpu
from benchmarks.timing import interleave, paired_ratio
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.tasks import DPO
from lightning_lora.tasks.rl.functional.preference_loss import preference_loss

Step = Callable[[], object]


def pairs(count: int, tokens: int, vocab: int) -> dict[str, Tensor]:
    """Random pairs; the first half of each row is the prompt."""
    ids = torch.randint(vocab, (count, 2, tokens))
    labels = ids.masked_fill(torch.arange(tokens) < tokens // 2, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def one_model(folder: str, rank: int, batch: dict[str, Tensor]) -> tuple[DPO, Step]:
    """`DPO` with its reference inside, and its step."""
    module = DPO(folder, lora=LoRAConfig(rank=rank))
    module.configure_model()
    assert module.model is not None
    module.reference.fix(module.model)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        module.score(batch).losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return module, step


def two_models(folder: str, batch: dict[str, Tensor]) -> Step:
    """The usual way: a policy trained in full, a second model as its reference, and logits of all tokens."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    reference.requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    ids, labels = batch["input_ids"].flatten(0, 1), batch["labels"].flatten(0, 1)[:, 1:]

    def logprobs(model: Any) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        found = logits.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        return (found * (labels != -100)).sum(-1).view(-1, 2)

    def step() -> None:
        with torch.no_grad():
            at_start = logprobs(reference)
        preference_loss(*logprobs(policy).unbind(1), *at_start.unbind(1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def third_peak(make: Callable[[], Step]) -> int:
    """Bytes at the peak of the third step, everything that ``make`` has built included."""
    made: list[Step] = []

    def prepare() -> None:
        made.append(make())
        for _ in range(2):
            made[0]()

    return peak_on_cpu(lambda: made[0](), prepare)


def seconds(step: Step) -> float:
    """CPU seconds of the process for one step."""
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        held_as_float32 = str(Path(folder) / "model")
        base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        base.save_pretrained(held_as_float32)
        measure(arguments, held_as_float32, base.config.vocab_size)


def measure(arguments: argparse.Namespace, folder: str, vocab: int) -> None:
    """Print the tables."""
    batch = pairs(arguments.pairs, arguments.tokens, vocab)
    ours = third_peak(lambda: one_model(folder, arguments.rank, batch)[1])
    usual = third_peak(lambda: two_models(folder, batch))
    print("| peak of a step | MB | ratio |\n|---|---|---|")
    print(f"| two models, in full | {usual / 1e6:.0f} | 1 |")
    print(f"| DPO, rank {arguments.rank} | {ours / 1e6:.0f} | **{ours / usual:.2f}** |\n")
    before, where = load(), machine(torch.device("cpu"))
    module, step = one_model(folder, arguments.rank, batch)
    rows = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
    reference = partial(module._of_reference, rows)

    def policy() -> None:
        module._logprobs(rows).sum().backward()

    ways = {
        "step": partial(seconds, step),
        "policy": partial(seconds, policy),
        "reference": partial(seconds, reference),
    }
    ways |= {"two models": partial(seconds, two_models(folder, batch))}
    times = interleave(ways, arguments.repetitions, warmups=2)
    print("| time | ratio |\n|---|---|")
    for name, over in (("reference", "policy"), ("step", "two models")):
        ratio = paired_ratio(times[name], times[over])
        print(f"| {name} / {over} | {ratio.p10:.2f} **{ratio.median:.2f}** {ratio.p90:.2f} |")
    print(f"\n{where['cpu']}, {where['threads']} threads, torch {where['versions']['torch']}; ", end="")
    print(f"load {before} before, {load()} after")


if __name__ == "__main__":
    main()
