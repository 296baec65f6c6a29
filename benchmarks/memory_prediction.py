"""Memory of a training step: predicted by a trace without values, and measured in a run of a real Trainer on this CPU.

    python -m benchmarks.memory_prediction            # prints the table of docs/understand/plan.md
    python -m benchmarks.memory_prediction lora nf4    # some rows

Measured are the allocator's events, which the profiler collects, in the third optimizer step, above weights and
adapters, whose size is known. Models are random and small enough for a minute, large enough that fixed costs vanish.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader

from benchmarks.machine import QUIET
from benchmarks.memory import peak_in_profile
from lightning_lora import LoRAConfig, StepMemory
from lightning_lora.memory.candidates import HEAD_ROWS, candidates
from lightning_lora.memory.step_trace import trace_step
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.tasks import CausalLM, SequenceClassifier

VOCAB = 4096
_MARK = "memory_prediction: measured step"


@dataclass(frozen=True)
class Case:
    """A module, a batch, and the settings of the Trainer."""

    module: Callable[[], LightningModule]
    batch: Callable[[], Any]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compared:
    """Bytes above weights and adapters at the peak of a step."""

    name: str
    predicted: int
    measured: int
    weights: int

    @property
    def error(self) -> float:
        """How much more was predicted than measured, as a share of the measured."""
        return self.predicted / self.measured - 1


def compare(name: str, case: Case) -> Compared:
    """Predict and measure one case."""
    traced = trace_step(case.module(), case.batch(), **case.settings).memory
    held = traced.weights + traced.adapters
    return Compared(name, traced.total - held, measured_bytes(case), held)


def measured_bytes(case: Case) -> int:
    """Bytes that the third optimizer step of a run held at its peak above weights and adapters."""
    module, batch = case.module(), case.batch()
    trainer = Trainer(**(case.settings | QUIET | {"max_steps": 3, "accelerator": "cpu"}), callbacks=[_Mark()])
    batches: DataLoader[Any] = DataLoader(cast(Any, [batch] * 8), batch_size=None, collate_fn=_own)
    # Prepare outside of the profile, as its first forward and backward do not see blocks from before; the precision of
    # the trainer decides the type of the base.
    module.trainer = trainer
    module.configure_model()
    gc.collect()  # what was freed in the profile, of a run before it, would count as freed by this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.fit(module, batches)
    return peak_in_profile(profiler, _MARK)


def _own(batch: Any) -> Any:
    """A batch of its own, as a loader makes it."""
    if isinstance(batch, dict):
        return {name: tensor.clone() for name, tensor in batch.items()}
    return [tensor.clone() for tensor in batch]


class _Mark(Callback):
    """Marks where the third optimizer step begins."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            with record_function(_MARK):
                pass


class Cnn(LightningModule):
    """A small convolutional classifier of images."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
        for _ in range(4):
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 100)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy."""
        images, classes = batch
        return nn.functional.cross_entropy(self.head(self.body(images).mean((2, 3))), classes)

    def configure_optimizers(self) -> Any:
        """AdamW of all that trains."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class LoRACnn(LoRAMixin, Cnn):
    """The same with adapters."""

    lora = LoRAConfig(rank=4)


class Checkpointed(CausalLM):
    """Computes activations again in the backward pass."""

    def configure_model(self) -> None:
        """Switch checkpointing on once the model is there."""
        built = self.model is not None
        super().configure_model()
        if not built:
            model: Any = self.model
            # transformers 5 has another name for it.
            switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            switch({"use_reentrant": False})


def tokens(rows: int = 4, length: int = 256, supervised: int = 10**9) -> Callable[[], dict[str, Tensor]]:
    """Batches of padded rows, supervised at the end."""

    def make() -> dict[str, Tensor]:
        ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:, : max(0, length - supervised)] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return make


def packed(rows: int = 4, length: int = 256) -> dict[str, Tensor]:
    """Rows that hold four examples each."""
    batch = tokens(rows, length)()
    del batch["attention_mask"]
    return batch | {"position_ids": torch.arange(length // 4).repeat(rows, 4)}


def sequences() -> dict[str, Tensor]:
    """Rows with a class each."""
    batch = tokens(8, 128)()
    return batch | {"labels": torch.arange(8) % 3}


def images() -> list[Tensor]:
    """Images with a class each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 3, 48, 48, generator=generator), torch.arange(16)]


def folders(top: Path) -> dict[str, str]:
    """Random models on disk: a llama, a mixture of experts, a BERT."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    # Pyright takes each value of a dict for every setting, so the classes are Any.
    llama, moe, bert = cast(Any, LlamaConfig), cast(Any, MixtralConfig), cast(Any, BertConfig)
    shape: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    grouped = {"num_key_value_heads": 2, "intermediate_size": 688, **ends}
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(llama(**shape, **grouped)),
        "moe": MixtralForCausalLM(moe(**shape, **grouped, num_local_experts=8, num_experts_per_tok=2)),
        "bert": BertForSequenceClassification(bert(**shape, intermediate_size=1024, num_labels=3)),
    }
    for name, model in models.items():
        model.save_pretrained(top / name)
    return {name: str(top / name) for name in models}


def cases(folder: dict[str, str]) -> dict[str, Case]:
    """The rows of the table."""
    lora, dropped = {"rank": 16}, {"rank": 16, "dropout": 0.1}
    llama, moe, bert = folder["llama"], folder["moe"], folder["bert"]
    return {
        "lora": Case(lambda: CausalLM(llama, lora=lora), tokens()),
        "lora-dropout": Case(lambda: CausalLM(llama, lora=dropped), tokens()),
        "lora-few-labels": Case(lambda: CausalLM(llama, lora=lora), tokens(supervised=16)),
        "lora-clip-accumulate": Case(
            lambda: CausalLM(llama, lora=lora), tokens(2), {"gradient_clip_val": 1.0, "accumulate_grad_batches": 4}
        ),
        "full": Case(lambda: CausalLM(llama), tokens()),
        "full-clip-accumulate": Case(
            lambda: CausalLM(llama), tokens(2), {"gradient_clip_val": 1.0, "accumulate_grad_batches": 4}
        ),
        "nf4": Case(lambda: CausalLM(llama, lora=lora, quantization="nf4"), tokens()),
        "int8": Case(lambda: CausalLM(llama, lora=lora, quantization="int8"), tokens()),
        "amp-lora": Case(lambda: CausalLM(llama, lora=lora), tokens(), {"precision": "bf16-mixed"}),
        "amp-full": Case(lambda: CausalLM(llama), tokens(), {"precision": "bf16-mixed"}),
        "bfloat16-lora": Case(lambda: CausalLM(llama, lora=lora, dtype="bfloat16"), tokens()),
        "packed": Case(lambda: CausalLM(llama, lora=lora), packed),
        "checkpointed": Case(lambda: Checkpointed(llama, lora=lora), tokens(8)),
        **{
            f"8 rows: {way}": Case(partial(CausalLM, llama, lora=lora, step_memory=way), tokens(8))
            for way in candidates(StepMemory(), CausalLM.step_memory_choices)
            if way.head_rows != HEAD_ROWS[0]  # there are 2,048 tokens
        },
        "moe-lora": Case(lambda: CausalLM(moe, lora=lora), tokens(4, 128)),
        "moe-full": Case(lambda: CausalLM(moe), tokens(4, 128)),
        "encoder-lora": Case(lambda: SequenceClassifier(bert, num_labels=3, lora=lora), sequences),
        "encoder-full": Case(lambda: SequenceClassifier(bert, num_labels=3), sequences),
        "cnn-lora": Case(LoRACnn, images),
        "cnn-full": Case(Cnn, images),
    }


def main(names: list[str]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as top:
        with contextlib.redirect_stdout(io.StringIO()):
            known = cases(folders(Path(top)))
        print("| step | weights and adapters, MiB | predicted above, MiB | measured above, MiB | error |")
        print("|---|---|---|---|---|")
        for name in names or known:
            row = compare(name, known[name])
            numbers = " | ".join(f"{size / 2**20:.1f}" for size in (row.weights, row.predicted, row.measured))
            print(f"| {name} | {numbers} | {row.error:+.1%} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
