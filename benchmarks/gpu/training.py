"""Runs of a Trainer: precisions, callbacks, the monitor, packing, quantised bases."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_lora
from benchmarks.gpu.models import on_device
from benchmarks.gpu.place import Place
from lightning_lora.callbacks import (
    BatchSizeMonitor,
    CapacityMonitor,
    CheckpointGuard,
    FiniteGradients,
    LoRAGuard,
    MemoryAdvice,
    MemoryChoice,
    RankGrowth,
)
from lightning_lora.data import SFTDataModule
from lightning_lora.tasks import CausalLM

ASSETS = Path(lightning_lora.__file__).parent / "assets"
TINY = ASSETS / "tiny-base"


class StepClock(Callback):
    """Keeps when each batch began, and its loss."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.moments.append(time.perf_counter())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(trainer.callback_metrics["train_loss"].detach().clone())

    def milliseconds(self) -> float:
        """Median of a batch, the first two left out."""
        gaps = [(end - begin) * 1e3 for begin, end in pairwise(self.moments[2:])]
        return statistics.median(gaps) if gaps else 0.0


def causal_lm(folder: Path, **settings: Any) -> CausalLM:
    seed_everything(0, verbose=False)
    return CausalLM(str(folder), **({"learning_rate": 1e-4, "lora": {"rank": 16}} | settings))


def gsm8k(place: Place, rows: int, length: int, **settings: Any) -> LightningDataModule:
    rows, length = place.pick((rows, length), (2, 64))
    settings |= place.pick({}, {"max_rows": 16})
    files = (str(ASSETS / "gsm8k" / f"{part}.jsonl") for part in ("train", "validation"))
    return SFTDataModule(*files, batch_size=rows, max_length=length, **settings)


def fit(
    place: Place,
    module: LightningModule,
    data: LightningDataModule,
    steps: int,
    callbacks: Sequence[Callback] = (),
    ckpt_path: str | None = None,
    **options: Any,
) -> tuple[StepClock, Trainer]:
    clock = StepClock()
    settings = {"accelerator": place.pick("gpu", "cpu"), "devices": 1, "logger": False, "limit_val_batches": 0}
    settings |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"max_steps": steps, "callbacks": [clock, *callbacks], "default_root_dir": str(place.out)}
    trainer = Trainer(**(settings | options))
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return clock, trainer


def model_folder(place: Place) -> Path:
    """A random model of eight of 1B's layers with the embedded tokenizer, saved."""
    folder = place.out / "model" if place.dry else Path(tempfile.gettempdir()) / "on_gpu_model"
    if not folder.exists():
        shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32}
        config = LlamaConfig.from_pretrained(TINY, **place.pick(shape | {"num_key_value_heads": 8, "head_dim": 64}, {}))
        model: Any = on_device(place, partial(LlamaForCausalLM, config), torch.bfloat16)
        model.save_pretrained(folder)
        for file in TINY.glob("*"):
            if not (folder / file.name).exists() and file.suffix != ".safetensors":
                shutil.copy(file, folder)
    return folder


def trainer_runs(place: Place) -> dict[str, Any]:
    """CausalLM in a Trainer: precisions, the callbacks of the command line, the monitor."""
    low: dict[str, Any] = {"precision": "bf16-true"}
    usual = [FiniteGradients(), MemoryChoice(), MemoryAdvice(), LoRAGuard(), CheckpointGuard()]
    # Settings of the task, settings of the data, options of the Trainer.
    runs: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "bf16-true": ({}, {}, low),
        "bf16-true, full": ({"lora": None}, {}, low),
        "bf16-true, callbacks": ({}, {}, low | {"callbacks": usual}),
        "bf16-true, monitor (rows)": ({}, {}, low | {"callbacks": [BatchSizeMonitor()]}),
        "bf16-true, monitor (2 micro-batches)": (
            {},
            {},
            low | {"accumulate_grad_batches": 2, "callbacks": [BatchSizeMonitor()]},
        ),
        "bf16-true, capacity monitor": ({}, {}, low | {"callbacks": [CapacityMonitor()]}),
        "bf16-true, rank grows": (
            {"lora": {"rank": 4}},
            {},
            low | {"callbacks": [RankGrowth(every_n_steps=place.pick(8, 1), threshold=1e-6)]},
        ),
        "bf16-true, DoRA": ({"lora": {"rank": 16, "dora": True}}, {}, low),
        "bf16-true, gradient start": ({"lora": {"rank": 16, "init": "gradient"}}, {}, low),
        "bf16-true, PiSSA": ({"lora": {"rank": 16, "init": "pissa"}}, {}, low),
        "bf16-true, accumulate 2": ({}, {}, low | {"accumulate_grad_batches": 2}),
        "bf16-mixed": ({}, {}, {"precision": "bf16-mixed"}),
        "bf16-mixed, bfloat16 base": ({"dtype": "bfloat16"}, {}, {"precision": "bf16-mixed"}),
        "16-mixed": ({}, {}, {"precision": "16-mixed"}),
        "32-true": ({}, {}, {"precision": "32-true"}),
        "bf16-true, packing": ({}, {"packing": True}, low),
    }
    for name, (task, data, options) in runs.items():
        run(place, name, task, data, place.pick(16, 2), **options)
    return place.found


def quantised(place: Place) -> dict[str, Any]:
    """QLoRA: NF4 and int8 against bfloat16, in a Trainer."""
    for name in (None, "nf4", "int8"):
        task = {"quantization": name, "dtype": "bfloat16"}
        run(place, str(name), task, {}, place.pick(10, 2), precision="bf16-true")
    return place.found


def run(place: Place, name: str, task: dict[str, Any], data: dict[str, Any], steps: int, **options: Any) -> None:
    """Train and write a row; a run that fails costs its row only."""
    place.fresh()
    try:
        clock, _ = fit(place, causal_lm(model_folder(place), **task), gsm8k(place, 8, 512, **data), steps, **options)
        place.found[name] = {
            "ms a micro-batch": round(clock.milliseconds(), 1),
            "peak GiB": round(place.peak(), 2),
            "first, last loss": [float(clock.losses[0]), float(clock.losses[-1])],
        }
    except Exception as reason:
        place.found[name] = {"failed": f"{type(reason).__name__}: {str(reason).splitlines()[0][:300]}"}
