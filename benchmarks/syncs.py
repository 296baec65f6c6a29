"""Counts where a fit would wait for the device, and the operators of its steps, on a machine without a GPU.

    python -m benchmarks.syncs

A Trainer trains the embedded model with every callback that ``lightning-lora fit`` adds. Weights, optimizer state and
batches stand for tensors on the device, and so does what is computed from them or made with ``device=``; other tensors
are on the host. A *sync* is an operation that a GPU can answer only when it has finished its work: reading a number
(``item``, ``bool``, ``tolist``, ``cpu``), a result whose shape depends on values (``nonzero``, boolean masks,
``unique``, ``repeat_interleave``), and making a device tensor of Python numbers. Copies by ``.to(device)`` are not
seen.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Self, override

from benchmarks.monitor import Alternating
from lightning_lora import LoRAConfig
from lightning_lora.batch_facts import FACTS
from lightning_lora.callbacks import LoRAProgressBar
from lightning_lora.cli.embedded import MODEL, TRAIN
from lightning_lora.cli.lora_cli import DEFAULTS
from lightning_lora.data import SFTDataModule
from lightning_lora.tasks import CausalLM

READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}
"""Operators that give the host a value."""
SHAPES = {"nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
"""Operators whose result has a shape that only values tell."""
_OWN = (Path(__file__).name, "capture.py")
_TORCH = str(Path(torch.__file__).parent)


class Sync(NamedTuple):
    """One wait for the device.

    Args:
        step: Optimizer steps done before it; None outside of the training loop.
        op: What waits.
        place: The innermost line outside of torch, as ``file:line function``.
    """

    step: int | None
    op: str
    place: str


class SyncCounter(Callback):
    """Counts syncs and operators of a fit by optimizer step; use it as a context manager around ``fit`` as well.

    Give it to the Trainer as its first callback: it must see a batch before others do.

    Attributes:
        syncs: All syncs in training, in order.
        num_ops: Operators of each optimizer step, views included, without those on tensors of the host.
    """

    def __init__(self) -> None:
        self.syncs: list[Sync] = []
        self.num_ops: Counter[int] = Counter()
        self.step: int | None = None
        # By identity, and only while they live: the address of a storage that is gone is soon another one's.
        self._device: Any = WeakIdKeyDictionary()
        self._modes = (_Operators(self), _Reads(self))

    def __enter__(self) -> Self:
        """Begin to watch."""
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop watching."""
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    @property
    def by_step(self) -> dict[int, list[Sync]]:
        """The syncs of each optimizer step that had an operator."""
        return {step: [sync for sync in self.syncs if sync.step == step] for step in self.num_ops}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights and optimizer state are on the device."""
        self.mark(pl_module.state_dict(keep_vars=True).values())

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """So is the batch."""
        self.step = trainer.global_step
        facts = batch.get(FACTS) if isinstance(batch, Mapping) else None
        self.mark([*tree_leaves(batch), getattr(facts, "places", None)])

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows is no step."""
        self.step = None

    def mark(self, values: Iterable[Any]) -> None:
        """Take the tensors among ``values`` for tensors on the device."""
        for storage in [s for value in values for s in _storages(value)]:
            self._device[storage] = True

    def forget(self, values: Iterable[Any]) -> None:
        """Take the tensors among ``values`` for tensors of the host."""
        for storage in [s for value in values for s in _storages(value)]:
            self._device.pop(storage, None)

    def is_on_device(self, value: Any) -> bool:
        """Whether a value stands for a tensor on the device."""
        return any(storage in self._device for storage in _storages(value))

    def refusal(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], on_device: bool) -> str | None:
        """What is wrong with an operator, by its name; None if nothing is.

        Args:
            func: The operator.
            args: Its arguments.
            kwargs: Its named arguments.
            on_device: Whether one of them is on the device.
        """
        return func.name().removeprefix("aten::") if on_device and _waits(func, args) else None

    def add(self, op: str) -> None:
        """Note a sync."""
        self.syncs.append(Sync(self.step, op, _place()))


class _Operators(TorchDispatchMode):
    """Sees every operator, below autograd."""

    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self.counter = counter

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, counter = func(*args, **(kwargs or {})), self.counter
        given, made = tree_leaves((args, kwargs)), tree_leaves(out)
        # `lift_fresh` is what `torch.tensor` calls on its new tensor.
        on_device = func is not torch.ops.aten.lift_fresh.default and any(map(counter.is_on_device, given))
        if counter.step is not None and (on_device or not any(isinstance(each, Tensor) for each in given)):
            counter.num_ops[counter.step] += 1
        (counter.mark if on_device else counter.forget)(made)
        if (reason := counter.refusal(func, args, kwargs or {}, on_device)) is not None:
            counter.add(reason)
        return out


class _Reads(TorchFunctionMode):
    """Sees the calls that no operator shows while all tensors are on a CPU."""

    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self.counter = counter

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, counter = func(*args, **(kwargs or {})), self.counter
        if (kwargs or {}).get("device") is not None and isinstance(out, Tensor):
            counter.mark([out])
            if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
                counter.add("tensor(device=)")
        elif func in (Tensor.cpu, Tensor.tolist, Tensor.numpy) and counter.is_on_device(args[0]):
            counter.add(func.__name__)
            if isinstance(out, Tensor):
                out = out.clone()
                counter.forget([out])
        return out


def _waits(func: Any, args: tuple[Any, ...]) -> bool:
    name = func.name().partition(".")[0]
    if name in READS or name.removeprefix("aten::") in SHAPES:
        return True
    if name == "aten::repeat_interleave":
        return True
    if name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"):
        masks = any(isinstance(at, Tensor) and at.dtype in (torch.bool, torch.uint8) for at in args[1])
        # One number under a mask is a `masked_fill`.
        return masks and not (len(args) > 2 and args[2].numel() == 1)
    return False


def _storages(value: Any) -> list[torch.UntypedStorage]:
    if isinstance(value, Mapping):
        return [storage for each in value.values() for storage in _storages(each)]
    return [value.untyped_storage()] if isinstance(value, Tensor) and not value.is_sparse else []


def _place() -> str:
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, "<")) and Path(file).name not in _OWN:
            parts = Path(file).parts
            return f"{'/'.join(parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def count(
    module: LightningModule,
    data: Any,
    folder: Path,
    callbacks: Iterable[Callback],
    counter: SyncCounter | None = None,
    **options: Any,
) -> SyncCounter:
    """Train without a logger, and return the counts, of ``counter`` if one is given."""
    counter = counter or SyncCounter()
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_model_summary": False}
    settings |= {"limit_val_batches": 0, "default_root_dir": str(folder), "enable_checkpointing": False}
    trainer = Trainer(**(settings | options), callbacks=[counter, *callbacks])
    with counter:
        trainer.fit(module, data)
    return counter


def of_command() -> list[Callback]:
    """The callbacks that ``lightning-lora fit`` adds."""
    return [default() for default in (*DEFAULTS, LoRAProgressBar)]


def monitored_ratio(counter: SyncCounter) -> float:
    """Operators of the cheapest step that `Alternating` has measured, over those of the cheapest other one."""
    by_step = list(counter.num_ops.items())[2:]  # the first steps make optimizer state
    return min(n for step, n in by_step if step % 2) / min(n for step, n in by_step if not step % 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    told = {"fit": [], "fit, rows measured in every second step": [Alternating()]}
    for name, more in told.items():
        seed_everything(0, verbose=False)
        model = CausalLM(str(MODEL), learning_rate=2e-5, lora=LoRAConfig(rank=arguments.rank))
        data = SFTDataModule(str(TRAIN), batch_size=4, max_length=256)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counter = count(model, data, Path(folder), [*of_command(), *more], max_steps=arguments.steps)
        print(f"\n## {name}\n\n| step | operators | syncs | where |\n|---|---|---|---|")
        for step, syncs in counter.by_step.items():
            places = Counter(f"{sync.op} {sync.place}" for sync in syncs)
            where = "; ".join(f"{n} x {place}" if n > 1 else place for place, n in places.items())
            print(f"| {step + 1} | {counter.num_ops[step]} | {len(syncs)} | {where} |")
        if more:
            print(f"\na measured step takes {monitored_ratio(counter):.2f} of the operators of another one")


if __name__ == "__main__":
    main()
