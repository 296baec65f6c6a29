"""The pre-trained base of the small studies: trained once, and kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from lightning_lora.files.atomic import atomic_file
from studies.modules.rows import OLD_FACTS, TASKS, VOCAB, Rows, Task, rows_of
from studies.modules.tiny_gpt import TinyGPT, row_losses

FOLDER = Path("runs", "bases")
RATE, BATCH, ROWS = 2e-3, 64, 20_000
ORDER: tuple[Task, ...] = ("facts", "text", "facts", "copy")


def pretrained(width: int, num_layers: int, num_experts: int = 0, steps: int = 3000, folder: Path = FOLDER) -> TinyGPT:
    """A `TinyGPT` that knows old facts, an old text and how to copy; trained now if ``folder`` does not have it.

    LoRA on random frozen weights would show nothing of fine-tuning.

    Args:
        width: Of the network.
        num_layers: Blocks.
        num_experts: Experts of a block, 0 for a dense one.
        steps: Optimizer steps of pre-training, half of them on facts.
        folder: Where bases are kept.
    """
    made_with = {"width": width, "layers": num_layers, "experts": num_experts, "steps": steps, "version": 1}
    name = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{name}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyGPT(VOCAB, width, num_layers, num_heads=4, num_experts=num_experts)
        if not path.is_file():
            _train(model, steps)
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(save(model.state_dict()))
    model.load_state_dict(load_file(path))
    return model


def _train(model: TinyGPT, steps: int) -> None:
    rows = {task: rows_of(task, "old", OLD_FACTS if task == "facts" else ROWS) for task in TASKS}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in range(steps):
        batch = _batch(rows[ORDER[step % len(ORDER)]])
        loss, _ = row_losses(model(batch["input_ids"]), batch["labels"])
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _batch(rows: Rows) -> Rows:
    places = torch.randint(len(rows["labels"]), (BATCH,))
    return {"input_ids": rows["input_ids"][places], "labels": rows["labels"][places]}
