"""One training step with magnitudes (DoRA) against one without, and PEFT's DoRA on the same weights and batch.

    python -m benchmarks.dora --threads 2

All take turns in an order drawn anew each repetition; a ratio is that within a repetition, so that what slows both
cancels. Prints Markdown, and says whether others used the machine. Nothing else should run on it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch import nn

from benchmarks.contenders import LEARNING_RATE, PEFT, Trainee, fused_adamw
from benchmarks.machine import disturbed, load, machine
from benchmarks.timing import interleave, paired_ratio, spread, train_step
from benchmarks.workloads import WORKLOADS
from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.mixin.optim import parameter_groups

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours(model: nn.Module, rank: int, dora: bool) -> Trainee:
    """Adapters of this package."""
    inject_lora(model, LoRAConfig(rank=rank, dora=dora))
    return Trainee(model, fused_adamw(parameter_groups(model, LEARNING_RATE)))


def theirs(model: Any, rank: int, dora: bool) -> Trainee:
    """Adapters of PEFT."""
    config = peft.LoraConfig(r=rank, target_modules=LINEAR, use_dora=dora, task_type="CAUSAL_LM")
    wrapped: Any = peft.get_peft_model(model, config)
    return Trainee(wrapped, fused_adamw([p for p in wrapped.parameters() if p.requires_grad]))


CONTENDERS: dict[str, Callable[[nn.Module, int], Trainee]] = {
    "LoRA": partial(ours, dora=False),
    "DoRA": partial(ours, dora=True),
    f"{PEFT} LoRA": partial(theirs, dora=False),
    f"{PEFT} DoRA": partial(theirs, dora=True),
}


def measured(workload: str, rank: int, repetitions: int, warmups: int, seed: int) -> str:
    """A Markdown table of median seconds of a step and of ratios to the step of LoRA."""
    before, steps = load(), {}
    for name, adapt in CONTENDERS.items():
        torch.manual_seed(seed)
        trainee = adapt(WORKLOADS[workload].build().train(), rank)
        steps[name] = partial(train_step, trainee, WORKLOADS[workload].batch(seed=seed))
    times = {name: [t.step for t in found] for name, found in interleave(steps, repetitions, warmups, seed).items()}
    about, after = machine(torch.device("cpu")), load()
    lines = ["| step | median | of LoRA's | 10th to 90th percentile |", "|---|---|---|---|"]
    for name, found in times.items():
        ratio = paired_ratio(found, times["LoRA"])
        middle = f"{1e3 * spread(found).median:.0f} ms | {ratio.median:.2f}"
        lines.append(f"| {name} | {middle} | {ratio.p10:.2f} to {ratio.p90:.2f} |")
    busy = {True: "others used it", False: "idle but for this", None: "load unknown"}[disturbed(before, after)]
    lines += ["", f"{workload} ({WORKLOADS[workload].about}), rank {rank}, {repetitions} repetitions, seed {seed}."]
    lines += [
        f"{about['cpu']}, {about['threads']} threads, torch {about['versions']['torch']}; {busy}, {before=}, {after=}."
    ]
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--workload", choices=["tiny", "llama-28m"], default="llama-28m")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(given))
    if (threads := options.pop("threads")) is not None:
        torch.set_num_threads(threads)
    print(measured(**options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
