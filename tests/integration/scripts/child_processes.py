"""Runs whose training happens in child processes: ``python child_processes.py FOLDER STRATEGY DEVICES KIND``.

What the calling process finds in its own module goes to ``FOLDER/STRATEGY-KIND.json``.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_lora import LoRAConfig, LoRAMixin, load_adapter, lora_layers, lora_state_dict, save_adapter
from lightning_lora.callbacks import LoRA, LoRAGuard
from lightning_lora.tasks import CausalLM
from tests.support import toys

CONFIG = LoRAConfig(rank=2)


class LatePlain(toys.Plain):
    """Builds its layers in ``configure_model``, with other values every time."""

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = toys.Net(seed=int(torch.randint(1000, ())))


class Late(LoRAMixin, LatePlain):
    """The same with the mixin."""

    lora = CONFIG


def applied() -> LoRAMixin:
    module = toys.Toy()
    module.apply_lora()
    return module


KINDS: dict[str, Any] = {
    "plain": toys.Plain,
    "mixin": toys.Toy,
    "applied": applied,
    "late": Late,
    "callback": toys.Plain,
    "late-callback": LatePlain,
    "task": None,
}


def loss(module: LightningModule) -> float:
    with torch.no_grad():
        if isinstance(module, CausalLM):
            assert module.model is not None
            rows = toys.token_rows()
            batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            return float(module.model(**batch).loss)
        x, y = toys.rows().tensors
        return float((module(x) - y).square().mean())


class WriteState(Callback):
    """Writes what the first of the processes that train has at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.path)


def run(folder: Path, strategy: str, devices: int, kind: str) -> dict[str, Any]:
    """Train twice, validate and save in between; with processes that must import everything, train once."""
    torch.manual_seed(0)
    task = CausalLM(str(folder / "llama"), learning_rate=2e-3, lora=CONFIG) if kind == "task" else None
    module = task or KINDS[kind]()
    loader = torch.utils.data.DataLoader(toys.token_rows(), batch_size=2) if task else toys.loader()  # pyright: ignore
    seen: dict[str, Any] = {"losses": [], "same": []}
    state = folder / f"{strategy}-{kind}.pt"
    for _ in range(1 if strategy == "ddp_spawn" else 2):
        callbacks: list[Callback] = [WriteState(state), *([] if kind == "plain" else [LoRAGuard()])]
        callbacks = [*([LoRA(CONFIG)] if "callback" in kind else []), *callbacks]
        trainer = toys.trainer(folder, strategy=strategy, devices=devices, max_epochs=3, callbacks=callbacks)
        trainer.fit(module, loader)
        seen["losses"].append(loss(module))
        seen["same"].append(toys.same(torch.load(state, weights_only=True), toys.snapshot(module)))
        if kind == "plain" or strategy == "ddp_spawn":
            continue
        (result,) = trainer.validate(module, loader, verbose=False)
        seen["validated"] = result["val_loss"]
        seen["adapters"] = len(lora_layers(module))
        save_adapter(module, folder / f"{strategy}-{kind}")
    if kind not in ("plain", "late", "late-callback") and strategy != "ddp_spawn":
        fresh = CausalLM(str(folder / "llama"), lora=CONFIG) if task else KINDS[kind]()
        fresh.configure_model()
        load_adapter(fresh, folder / f"{strategy}-{kind}")
        seen["reloaded"] = toys.same(lora_state_dict(fresh), lora_state_dict(module))
    return seen


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    where, name, count, what = sys.argv[1:]
    found = run(Path(where), name, int(count), what)
    Path(where, f"{name}-{what}.json").write_text(json.dumps(found))
