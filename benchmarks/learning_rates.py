"""The best learning rate of LoRA and of full fine-tuning on the embedded model and data: the demo's setting.

    python benchmarks/learning_rates.py --steps 45 --seeds 0 1

Prints a Markdown table of validation losses after the last step, nats per answer token, and the machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics

import torch

from lightning_lora import LoRAConfig
from lightning_lora.cli.demo_arm import BATCH_SIZE, train_arm

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
METHODS = {"LoRA, rank 32": LoRAConfig(rank=32, lr_multiplier=1.0), "full fine-tuning": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    rows = []
    for name, lora in METHODS.items():
        for rate in RATES:
            arms = [
                train_arm(f"{name}, {rate:g}, seed {seed}", lora, rate, arguments.steps, seed, None)
                for seed in arguments.seeds
            ]
            losses = [arm.val_losses[max(arm.val_losses)] for arm in arms]
            cells = " | ".join(f"{loss:.3f}" for loss in losses)
            rows.append(f"| {name} | {rate:g} | {cells} | {statistics.mean(losses):.3f} |")
    seeds = " | ".join(f"seed {seed}" for seed in arguments.seeds)
    print(
        f"\n{arguments.steps} steps of {BATCH_SIZE} rows; {platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}\n"
    )
    print(f"| method | learning rate | {seeds} | mean |")
    print("|---|---|" + "---|" * (len(arguments.seeds) + 1))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
