"""Growth from a small rank against the final rank from the start, on a language model and real rows.

    python -m benchmarks.rank_growth_gsm8k --seeds 0 1 2

The embedded model is trained on the embedded rows of GSM8K, with the same number of steps and the same scale of the
updates for every method: a small rank, `RankGrowth` from the small rank to the final one, the final rank from the
start. The learning rate of each method is the best of a sweep on a seed that is not used for the comparison. Prints
Markdown: validation losses in nats per answer token, and paired differences with 95 % intervals.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from benchmarks.machine import QUIET
from benchmarks.rank_growth import interval
from lightning_lora import LoRAConfig
from lightning_lora.callbacks import RankGrowth
from lightning_lora.cli.embedded import MODEL, TRAIN, VALIDATION
from lightning_lora.cli.quiet import quiet_libraries
from lightning_lora.data import SFTDataModule
from lightning_lora.lora.growth_plan import num_factor_parameters
from lightning_lora.tasks import CausalLM

SMALL, FINAL, SCALE = 4, 16, 2.0
BATCH = 4
RATES = (4e-3, 8e-3, 16e-3)
"""Learning rates of the adapters."""
METHODS = ("small", "grown", "final")
NAMES = {
    "small": f"rank {SMALL}",
    "grown": f"`RankGrowth` from {SMALL} to at most {FINAL}",
    "final": f"rank {FINAL} from the start",
}


@dataclass(frozen=True)
class Run:
    """What a run ended with.

    Args:
        loss: Validation loss, nats per answer token.
        parameters: Adapter parameters at the end.
        growths: Steps at which groups of layers grew.
        seconds: CPU time of the run.
    """

    loss: float
    parameters: int
    growths: tuple[int, ...]
    seconds: float


def train(method: str, rate: float, seed: int, steps: int, folder: str) -> Run:
    """Train the embedded model by a method."""
    start = time.process_time()
    seed_everything(seed, verbose=False)
    rank = FINAL if method == "final" else SMALL
    lora = LoRAConfig(rank=rank, alpha=SCALE * rank, lr_multiplier=1.0)
    module = CausalLM(str(MODEL), learning_rate=rate, lora=lora, warmup_steps=steps // 20, schedule="cosine")
    data = SFTDataModule(str(TRAIN), str(VALIDATION), batch_size=BATCH, seed=seed)
    growth = RankGrowth(max_rank=FINAL, budget=10**9)
    callbacks: list[Callback] = [growth] if method == "grown" else []
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=callbacks,
        **QUIET,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    judge = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    loss = judge.validate(module, data, verbose=False)[0]["val_loss"]
    grown = tuple(int(each["step"]) for each in growth.growths)
    return Run(loss, num_factor_parameters(module), grown, time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuning-seed", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet_libraries()
    torch.set_num_threads(1)
    runs: dict[str, list[Run]] = {}
    swept = "".join(f" {rate:g} |" for rate in RATES)
    print(f"| method |{swept} adapter parameters | validation loss, by seed | mean | growths, by seed |")
    print("|---|" + "---|" * (len(RATES) + 4))
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            tried = {rate: train(method, rate, arguments.tuning_seed, arguments.steps, folder).loss for rate in RATES}
            rate = min(tried, key=lambda rate: tried[rate])
            runs[method] = [train(method, rate, seed, arguments.steps, folder) for seed in arguments.seeds]
            sweep = " | ".join(f"**{loss:.4f}**" if each == rate else f"{loss:.4f}" for each, loss in tried.items())
            sizes = ", ".join(f"{size:,}" for size in sorted({run.parameters for run in runs[method]}))
            losses = " ".join(f"{run.loss:.4f}" for run in runs[method])
            mean = statistics.mean(run.loss for run in runs[method])
            growths = " ".join(str(len(run.growths)) for run in runs[method])
            print(f"| {NAMES[method]} | {sweep} | {sizes} | {losses} | {mean:.4f} | {growths} |", flush=True)
    print("\n| compared | mean difference, nats | 95 % interval |\n|---|---|---|")
    for one, other in (("grown", "final"), ("grown", "small"), ("final", "small")):
        pairs = [left.loss - right.loss for left, right in zip(runs[one], runs[other], strict=True)]
        print(f"| {NAMES[one]}, minus {NAMES[other]} | {interval(pairs)} |")
    seconds = (f"{NAMES[method]} {statistics.mean(run.seconds for run in runs[method]):.0f}" for method in METHODS)
    print(f"\nCPU seconds of a run: {', '.join(seconds)}")
    print(f"Steps with growths: {[sorted(set(run.growths)) for run in runs['grown']]}")
    told = f"{arguments.steps} steps of {BATCH} rows, seeds {arguments.seeds}, rates by seed {arguments.tuning_seed}"
    print(f"{told}; {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")


if __name__ == "__main__":
    main()
