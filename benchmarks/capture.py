"""Finds what a CUDA graph cannot capture in a training step, on a machine without a GPU.

    python -m benchmarks.capture

A graph records what the device is asked for, and replays it without the host. So a step may not, from the start of its
forward pass to the end of the optimizer's step,

- wait for the device (`benchmarks.syncs`), which capture refuses;
- draw random numbers by a generator of its own, which capture refuses to make;
- draw random numbers on the host, of which each replay would repeat the first ones;
- take a tensor of the host, other than a single number, which is a copy from memory that is not pinned.

Numbers of Python are recorded as they are, which nothing can see: a step must be the same with each batch. A Trainer
runs the steps, on CPU tensors that stand for those on the device. Adapters with dropout are told that a graph is being
captured, as torch would tell them.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from benchmarks.syncs import SyncCounter, count, of_command
from lightning_lora import LoRAConfig
from lightning_lora.cli.embedded import MODEL, TRAIN
from lightning_lora.data import SFTDataModule
from lightning_lora.lora.functional import seeded_dropout
from lightning_lora.tasks import CausalLM


class CaptureCounter(SyncCounter):
    """Finds what a CUDA graph cannot capture in the steps of a fit; use it as a context manager around ``fit`` as well.

    Give it to the Trainer as its first callback.
    """

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What follows, such as the next batch, is on no graph."""
        self.step = None

    @override
    def refusal(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], on_device: bool) -> str | None:
        reason = super().refusal(func, args, kwargs, on_device)
        if reason is not None or self.step is None:
            return reason
        name, given = func.name().removeprefix("aten::"), tree_leaves((args, kwargs))
        if any(isinstance(each, torch.Generator) and each is not torch.default_generator for each in given):
            return f"{name} by a generator of its own"
        if torch.Tag.nondeterministic_seeded in func.tags and not on_device:
            return f"{name} on the host"
        if on_device and any(isinstance(t, Tensor) and t.ndim and not self.is_on_device(t) for t in given):
            return f"{name} of a host tensor"
        return None


@contextmanager
def captured() -> Iterator[None]:
    """Let dropout believe that a CUDA graph is being captured."""
    with mock.patch.object(seeded_dropout, "is_captured", return_value=True):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| embedded model | operators of a step | not captured |\n|---|---|---|")
    for dropout in (0.0, 0.1):
        for name, callbacks in (("no callbacks", []), ("the callbacks of fit", of_command())):
            seed_everything(0, verbose=False)
            model = CausalLM(str(MODEL), learning_rate=2e-5, lora=LoRAConfig(rank=8, dropout=dropout))
            data = SFTDataModule(str(TRAIN), batch_size=4, max_length=256)
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), captured():
                warnings.simplefilter("ignore")
                counter = count(model, data, Path(folder), callbacks, CaptureCounter(), max_steps=arguments.steps)
            last = max(counter.by_step)
            places = Counter(f"{sync.op} {sync.place}" for sync in counter.by_step[last])
            where = "; ".join(f"{n} x {place}" for place, n in places.items()) or "nothing"
            print(f"| dropout {dropout:g}, {name} | {counter.num_ops[last]} | {where} |")


if __name__ == "__main__":
    main()
