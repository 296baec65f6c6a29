"""Time of setting up, per block, for models of more and more tiny blocks.

    python -m benchmarks.setup --blocks 50 100 200 400

Each operation's time per block should not grow with the number of blocks; `tests/lora/test_set_up.py` counts calls
instead.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.machine import load, machine
from lightning_lora import (
    LoRAConfig,
    count_parameters,
    inject_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
)

COMMON: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 8, "num_experts": 2, "head_dim": 4}
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "llama": lambda n: LlamaForCausalLM(LlamaConfig(**COMMON, num_key_value_heads=2, num_hidden_layers=n)),
    "qwen3_moe": lambda n: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, **EXPERTS, num_key_value_heads=2, num_hidden_layers=n)
    ),
}


def set_up(build: Callable[[int], nn.Module], num_blocks: int) -> dict[str, float]:
    """Seconds of each operation."""
    model, again = build(num_blocks), build(num_blocks)
    again.load_state_dict(model.state_dict())
    seconds: dict[str, float] = {}

    def timed(name: str, step: Callable[[], object]) -> None:
        start = time.perf_counter()
        step()
        seconds[name] = time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        timed("inject_lora", lambda: inject_lora(model, LoRAConfig(rank=2)))
        timed("count_parameters", lambda: count_parameters(model))
        timed("save_adapter", lambda: save_adapter(model, adapter))
        timed("load_adapter", lambda: load_adapter(again, adapter))
        timed("merge_lora", lambda: merge_lora(model))
        timed("remove_lora", lambda: remove_lora(model))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--repetitions", type=int, default=3, help="the fastest one counts")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="rank .* is more than")
    print(json.dumps(machine(torch.device("cpu")) | {"load": load()}))
    for name, build in MODELS.items():
        set_up(build, 2)  # imports and caches
        print(f"\n{name}, ms per block")
        for num_blocks in arguments.blocks:
            runs = [set_up(build, num_blocks) for _ in range(arguments.repetitions)]
            best = {operation: min(run[operation] for run in runs) for operation in runs[0]}
            cells = (f"{operation} {1000 * seconds / num_blocks:.2f}" for operation, seconds in best.items())
            print(f"{num_blocks:5}  {'  '.join(cells)}")


if __name__ == "__main__":
    main()
