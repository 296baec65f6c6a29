"""Quantised bases on the embedded model and data: memory, twenty training steps, and the error of merging.

    python benchmarks/quantised_bases.py

Prints a Markdown table and the machine. Losses are nats per answer token on 64 validation rows; the merge error is
the largest difference of logits between the run's model and the folder it was merged to, over the largest logit.
"""

from __future__ import annotations

import platform
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from transformers import AutoModelForCausalLM

from lightning_lora import LoRAConfig
from lightning_lora.cli.embedded import MODEL, TRAIN, VALIDATION
from lightning_lora.data import SFTDataModule
from lightning_lora.files.merge.merged_model import save_merged
from lightning_lora.lora.layers.quantised_weights import stored_parts
from lightning_lora.tasks import CausalLM

KINDS = (None, "nf4", "int8")


def weight_bytes(task: CausalLM) -> int:
    """Bytes of the base as it is stored, scales included."""
    parts = [part for name, p in task.named_parameters() if "lora_" not in name for part in stored_parts(p)]
    return sum(part.numel() * part.element_size() for part in parts)


def merge_error(task: CausalLM, rows: dict[str, torch.Tensor]) -> float:
    # In training mode, as the run computed: evaluating, the 8-bit layers round their inputs too.
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = AutoModelForCausalLM.from_pretrained(save_merged(task, Path(folder) / "merged")).train()
        expected = task.train()(rows["input_ids"]).float()
        return float((merged(rows["input_ids"]).logits - expected).abs().max() / expected.abs().max())


def run(quantization: str | None, dtype: str) -> str:
    seed_everything(0)
    data = SFTDataModule(str(TRAIN), str(VALIDATION), batch_size=8, max_length=128, validation_rows=64)
    task = CausalLM(str(MODEL), 3e-4, LoRAConfig(rank=32), dtype=dtype, quantization=quantization)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=20, enable_checkpointing=False, num_sanity_val_steps=0, **quiet)
    before = trainer.validate(task, data, verbose=False)[0]["val_loss"]
    trainer.fit(task, data)
    after = trainer.validate(task, data, verbose=False)[0]["val_loss"]
    error = merge_error(task, next(iter(data.val_dataloader())))
    name = quantization or "not quantised"
    return f"| {name} | {dtype} | {weight_bytes(task) / 1e6:.2f} | {before:.3f} | {after:.3f} | {error:.1e} |"


def main() -> None:
    torch.set_num_threads(1)
    rows = [run(quantization, dtype) for dtype in ("float32", "bfloat16") for quantization in KINDS]
    print("| base | other weights | MB | loss before | after 20 steps | merge error |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread")


if __name__ == "__main__":
    main()
