"""Hashes of what training leaves: two states of this repository that print the same train bit for bit alike.

    OMP_NUM_THREADS=1 python -m benchmarks.same_weights

Each run takes 20 optimizer steps on a CPU with fixed seeds: the embedded model with LoRA, with dropout, with
accumulation and in full; a mixture of experts; a convolutional network. A line gives a SHA-256 of all weights after
training and one of the tensors of the saved adapter folder. Hashes depend on the machine and the versions of torch and
transformers, so compare lines of one machine only. A refactoring must change none of them.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lightning_lora
from benchmarks.machine import QUIET
from lightning_lora import LoRAConfig, LoRAMixin
from lightning_lora.data import SFTDataModule
from lightning_lora.tasks import CausalLM

ASSETS = Path(lightning_lora.__file__).parent / "assets"
STEPS = 20


class ConvNet(LoRAMixin, LightningModule):
    """Two convolutions and a linear layer on random images."""

    lora = LoRAConfig(rank=4)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 16, 4)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        return (self.net(images) - targets).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(80, 3, 8, 8), torch.randn(80, 4)), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.lora_parameter_groups(1e-3))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def language_model(folder: Path = ASSETS / "tiny-base", **lora: Any) -> tuple[LightningModule, LightningDataModule]:
    data = SFTDataModule(str(ASSETS / "gsm8k" / "train.jsonl"), batch_size=4, max_length=128, max_rows=160)
    module = CausalLM(str(folder), learning_rate=1e-4, lora=LoRAConfig(**lora) if lora else None)
    return module, data


def mixture_of_experts(folder: Path) -> Path:
    """A small Qwen3-MoE with random weights and the embedded tokenizer, saved to ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-base")
    shape: dict[str, Any] = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(
        vocab_size=AutoConfig.from_pretrained(ASSETS / "tiny-base").vocab_size,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **shape,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(ASSETS / "tiny-base" / "chat_template.jinja", folder)
    return folder


def train(name: str, module: LightningModule, data: LightningDataModule | None, folder: Path, **options: Any) -> None:
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        **QUIET,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, datamodule=data)
    line = f"{name:<22} weights {digest(module.state_dict())}"
    if isinstance(module, LoRAMixin) and module.lora is not None:
        module.save_adapter(folder / name)
        line += f"  adapter {digest(load_file(folder / name / 'adapter_model.safetensors'))}"
    print(line, flush=True)


def runs(folder: Path) -> Iterable[tuple[str, Any, dict[str, Any]]]:
    yield "LoRA", lambda: language_model(rank=8), {}
    yield "LoRA, dropout", lambda: language_model(rank=8, dropout=0.1), {}
    yield "LoRA, accumulation", lambda: language_model(rank=8), {"accumulate_grad_batches": 2}
    yield "LoRA, bfloat16", lambda: language_model(rank=8), {"precision": "bf16-true"}
    yield "full fine-tuning", language_model, {}
    yield "experts", lambda: language_model(mixture_of_experts(folder / "moe"), rank=8), {}
    yield "convolutions", lambda: (ConvNet(), None), {}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        for name, build, options in runs(Path(scratch)):
            seed_everything(0, verbose=False)
            module, data = build()
            train(name, module, data, Path(scratch), **options)


if __name__ == "__main__":
    main()
