"""Where the time of a policy's step goes in a Trainer, and the learner's step against supervised training.

    python -m benchmarks.policy_step

CPU seconds of the process on one thread, so that others on the machine count little. A step lasts from the start of a
batch to the start of the next, the rollout between them included. *Overhead* is what is left of it without the
sampler, the reward, the learner's forward and backward passes, the reference's pass and the optimizer: Lightning,
logging, and the bookkeeping of rollouts. The learner's step, from the start of a batch to its end, is set against that
of `CausalLM` on the same tokens. All take turns in an order drawn anew each repetition. Prints Markdown.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import GenerationConfig
from typing_extensions import override

from benchmarks.machine import QUIET, machine
from benchmarks.timing import interleave, paired_ratio, spread
from lightning_lora import LoRAConfig
from lightning_lora.cli.embedded import MODEL
from lightning_lora.tasks import CausalLM, PolicyGradient
from lightning_lora.tasks.rl.rollout_maker import TokenScores
from lightning_lora.tasks.rl.sampling.in_process import InProcessSampler
from lightning_lora.tasks.rl.sampling.samples import Samples, SamplingSettings

Seconds = dict[str, float]
"""CPU seconds of a step, by part; ``step`` is all of it, ``learner`` that of a batch without its rollout."""

PARTS = ("sampler", "reward", "forward", "reference", "backward", "optimizer")
SFT = "supervised"
SAME_TOKENS = ("one step a rollout", "with a reference", "with a value head")


class Parts:
    """CPU seconds by part; a part that begins inside another one interrupts it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = time.process_time()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the block as ``name``."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        """From now on count as ``name``."""
        self._count()
        self._open.append(name)

    def end(self) -> None:
        """Go on with the part that was interrupted."""
        self._count()
        self._open.pop()

    def _count(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class Sampler(InProcessSampler):
    """Draws completions that all have their most tokens, so that every step has as many."""

    parts: Parts

    @override
    def load(self, model: Any, version: int) -> None:
        super().load(model, version)
        model.generation_config = GenerationConfig()

    @override
    def sample(
        self, prompts: list[Tensor], group_size: int, settings: SamplingSettings, generator: torch.Generator
    ) -> Samples:
        with self.parts.of("sampler"):
            return super().sample(prompts, group_size, settings, generator)


class TimedPolicy(PolicyGradient):
    """`PolicyGradient` that says where its time goes."""

    parts: Parts
    _pass = "forward"

    @override
    def score(self, batch: Mapping[str, Any]) -> TokenScores:
        with self.parts.of(self._pass):
            return super().score(batch)

    @override
    @contextmanager
    def as_reference(self) -> Iterator[None]:
        self._pass = "reference"
        with self.parts.of("reference"), super().as_reference():
            yield
        self._pass = "forward"

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self.parts.of("backward"):
            super().backward(loss, *args, **kwargs)


class Watch(Callback):
    """Seconds of every step of a run but the first, which makes the optimizer's state.

    Args:
        parts: Where the module counts its parts.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.steps: list[Seconds] = []
        self.batches: list[Any] = []
        self._start = self._learner = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.parts.end())

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.process_time()
        if len(self.batches) > 1:
            self.steps.append({**self.parts.seconds, "step": now - self._start, "learner": self._learner})
        self.batches.append(batch)
        self.parts.seconds.clear()
        self._start = now

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.parts.begin("optimizer")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._learner = time.process_time() - self._start


def coin(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """A reward of 0 or 1 that depends on the completion."""
    return [float(len(text) % 2) for text in completions]


def fit(module: LightningModule, loader: DataLoader[Any], steps: int) -> Watch:
    """Train for one step to settle, ``steps`` that are timed, and one that ends the last of them."""
    watch = Watch(getattr(module, "parts", Parts()))
    trainer = Trainer(
        max_steps=steps + 2,
        accelerator="cpu",
        callbacks=[watch],
        **QUIET,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loaders without workers, and of completions that are cut off
        trainer.fit(module, loader)
    return watch


WAYS: dict[str, dict[str, Any]] = {
    "one step a rollout": {},
    "with a reference": {"kl_coefficient": 0.1},
    "four steps a rollout": {"loss": "clip", "minibatches": 2, "epochs": 2},
    "with a value head": {"loss": "clip", "advantage": "gae"},
}


def policy(lora: LoRAConfig, group_size: int, new_tokens: int, **options: Any) -> TimedPolicy:
    """A policy on the model of this package."""
    sampler = Sampler()
    settings: dict[str, Any] = {"reward": coin, "reward_workers": 0, "sampler": sampler} | options
    module = TimedPolicy(str(MODEL), lora=lora, group_size=group_size, max_new_tokens=new_tokens, **settings)
    module.parts = sampler.parts = Parts()
    return module


def prompts_of(length: int, count: int, batch_size: int) -> DataLoader[Any]:
    """Random prompts of one length."""
    drawn = torch.Generator().manual_seed(0)
    rows = [torch.randint(2048, (length,), generator=drawn) for _ in range(count)]

    def collate(ids: list[Tensor]) -> dict[str, Any]:
        return {"input_ids": ids, "prompts": ["" for _ in ids], "columns": {}}

    return DataLoader(rows, batch_size=batch_size, collate_fn=collate)  # pyright: ignore[reportArgumentType]


def supervised_batch(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The minibatch of a policy as a batch of `CausalLM`: the same tokens, and the same of them trained."""
    ids = batch["input_ids"]
    is_next = torch.nn.functional.pad(batch["mask"][:, :-1], (1, 0)).bool()
    return {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": ids.where(is_next, -100)}


def ways(
    lora: LoRAConfig, prompts: int, group_size: int, prompt_tokens: int, new_tokens: int, steps: int
) -> dict[str, Callable[[], list[Seconds]]]:
    """What trains for some steps and returns the seconds of each: every policy, and supervised training."""
    loader = prompts_of(prompt_tokens, prompts * (steps + 2), prompts)
    found: dict[str, Callable[[], list[Seconds]]] = {}
    for name, options in WAYS.items():
        module = policy(lora, group_size, new_tokens, **options)
        found[name] = partial(_steps, module, loader, steps)
    supervised = CausalLM(str(MODEL), lora=lora)
    seen = fit(policy(lora, group_size, new_tokens), loader, 1).batches
    batch = supervised_batch(seen[0])
    batches: Any = [batch] * (steps + 2)
    found[SFT] = partial(_steps, supervised, DataLoader(batches, batch_size=None), steps)
    return found


def _steps(module: LightningModule, loader: DataLoader[Any], steps: int) -> list[Seconds]:
    return fit(module, loader, steps).steps


def mean_step(steps: list[Seconds]) -> Seconds:
    """The mean over the steps of a run, of which not every one has a rollout before it."""
    return {name: statistics.fmean(step.get(name, 0.0) for step in steps) for name in (*PARTS, "step", "learner")}


def measured(adapt_head: bool, rank: int, repetitions: int, steps: int, **sizes: int) -> str:
    """Two Markdown tables: the parts of a step, and the learner's step against supervised training."""
    lora = LoRAConfig(rank=rank, adapt_head=adapt_head, tied_weights="untie" if adapt_head else "refuse")
    times = interleave(ways(lora, steps=steps, **sizes), repetitions, warmups=1)
    means = {name: [mean_step(run) for run in runs] for name, runs in times.items()}
    titles = ["", "step, s", *PARTS, "overhead", "10th to 90th percentile"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in WAYS:
        seconds = spread([run["step"] for run in means[name]]).median
        shares = [spread([run[part] / run["step"] for run in means[name]]).median for part in PARTS]
        overhead = spread([1 - sum(run[part] for part in PARTS) / run["step"] for run in means[name]])
        cells = [name, f"{seconds:.2f}", *(f"{share:.1%}" for share in shares), f"**{overhead.median:.1%}**"]
        lines.append(f"| {' | '.join(cells)} | {overhead.p10:.1%} to {overhead.p90:.1%} |")
    lines += ["", "| learner's step / supervised step on the same tokens | ratio | 10th to 90th percentile |"]
    lines.append("|---|---|---|")
    base = [run["learner"] for run in means[SFT]]
    for name in SAME_TOKENS:
        ratio = paired_ratio([run["learner"] for run in means[name]], base)
        lines.append(f"| {name} | **{ratio.median:.2f}** | {ratio.p10:.2f} to {ratio.p90:.2f} |")
    about = machine(torch.device("cpu"))
    lines += ["", ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in {**sizes, "rank": rank}.items())]
    lines[-1] += f"; {'with' if adapt_head else 'without'} the output layer; {repetitions} runs of {steps} steps."
    lines += [f"{about['cpu']}, {about['threads']} threads, torch {about['versions']['torch']}."]
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--prompts", type=int, default=4, help="of a rollout")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapt-head", action="store_true", help="adapt the output layer too")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each run")
    options = vars(parser.parse_args(given))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(measured(**options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
