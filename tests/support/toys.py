"""Small modules, data and trainers that the tests share, and the warnings of others that they expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig
from lightning_lora.files.atomic import sha256
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.mixin.lora_mixin import LoRAMixin
from tests.support import warm

# Several threads only get in each other's way on matrices this small.
torch.set_num_threads(1)

ROOT = warm.ROOT

# Every line is somebody else's warning about our tiny runs; whatever is not listed fails the test.
EXPECTED_WARNINGS = (
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*isinstance.treespec, LeafSpec.*is deprecated",
    "ignore:The number of training batches .* is smaller than the logging interval:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:You're using the WeightAveraging callback with a model that overrides the configure_model:UserWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning",
    "ignore:Found [0-9]+ module.s. in eval mode at the start of training:UserWarning",
    "ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning",
)
expected_warnings = [pytest.mark.filterwarnings(line) for line in EXPECTED_WARNINGS]
# What `BatchSizeMonitor` says of our short runs over rows in order; tests that are about it expect it by name.
monitor_warnings = [
    pytest.mark.filterwarnings("ignore:.*optimizer steps? (is|are) few whatever the noise"),
    pytest.mark.filterwarnings("ignore:training rows come in the order they are stored in"),
    pytest.mark.filterwarnings("ignore:signal-limited"),
]

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Net(nn.Module):
    """Two linear layers with a nonlinearity, the same weights every time it is built with the same seed."""

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(4, width)
            self.second = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Plain(LightningModule):
    """A LightningModule that knows nothing of LoRA."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = Net(seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return (self(x) - y).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", (self(x) - y).square().mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Toy(LoRAMixin, Plain):
    """The same with the mixin in front."""

    lora = LoRAConfig(rank=2)


class ByHand(LightningModule):
    """Steps its optimizers itself."""

    automatic_optimization = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


def rows(count: int = 8, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.randn(count, 2, generator=generator))


def loader(count: int = 8, batch_size: int = 2, seed: int = 1) -> DataLoader[Any]:
    return DataLoader(rows(count, seed), batch_size=batch_size)


def trainer(folder: Path, **options: Any) -> Trainer:
    settings = {"max_epochs": 1, "enable_checkpointing": False, "default_root_dir": str(folder)}
    return Trainer(**(QUIET | settings | options))


def fit(module: LightningModule, folder: Path, ckpt_path: Path | None = None, **options: Any) -> Trainer:
    """Train ``module`` on the rows of `loader`; returns the finished trainer."""
    runner = trainer(folder, **options)
    runner.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True)
    return runner


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def tree(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with its hash."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether both hold the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def base_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything but the adapters."""
    return {name: tensor for name, tensor in snapshot(module).items() if "lora_" not in name}


def moved(module: nn.Module) -> list[bool]:
    """For every adapter, whether training has moved it."""
    return [layer.lora_moved for layer in lora_layers(module).values()]


def run_python(code: str, *arguments: object, ranks: int = 1, check: bool = True) -> warm.Done:
    """Run ``code`` in a process of its own, or in several ranks of which the first is returned."""
    return warm.run_ranks(ranks, "-c", code, *arguments, check=check)[0]


def save_llama(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A random llama of two narrow blocks, and a tokenizer, as a folder on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.tiny_tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    shape |= {"pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(**(shape | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def token_rows(count: int = 8, length: int = 10, vocab: int = 300, seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows of tokens whose numbers of supervised ones differ."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(count):
        ids = torch.randint(6, vocab, (length,), generator=generator)
        labels = ids.clone()
        labels[: 1 + (row * 3) % (length - 2)] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made
