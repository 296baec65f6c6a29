"""Tries whether a training step fits into memory, and leaves no trace of the trial."""

from __future__ import annotations

import copy
import gc
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora.checkpoints.loader_position import generators
from lightning_lora.checkpoints.random_state import kept_random_state

_NUM_ROWS = 1000
"""Rows among which the longest are searched."""


def is_out_of_memory(exception: BaseException) -> bool:
    """Whether an exception says that memory of a GPU or of the process ran out."""
    return isinstance(exception, (MemoryError, torch.OutOfMemoryError)) or is_oom_error(exception)


def can_choose_rows(loader: object) -> bool:
    """Whether `longest_batch` can choose rows of this loader."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def longest_batch(trainer: Trainer, loader: DataLoader[Any], num_rows: int) -> Any:
    """A batch, on the device, of the longest rows among the first 1,000 of an epoch, which need the most memory."""
    return longest_batches(trainer, loader, num_rows)(num_rows)


def longest_batches(trainer: Trainer, loader: DataLoader[Any], most: int) -> Callable[[int], Any]:
    """A function that makes a `longest_batch` of so many rows, at most ``most``; the rows are read once, now."""
    with kept_random_state(trainer.strategy.root_device, generators([loader])):
        batches: Any = loader.batch_sampler
        indices = islice((index for batch in batches for index in batch), _NUM_ROWS)
        rows = heapq.nlargest(most, (loader.dataset[index] for index in indices), key=row_size)

    def batch(num_rows: int) -> Any:
        with kept_random_state(trainer.strategy.root_device, generators([loader])):
            return on_device(trainer, loader.collate_fn(rows[:num_rows]))

    return batch


def on_device(trainer: Trainer, batch: Any) -> Any:
    """A batch as a loader makes it, on the device and with the precision of the run."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def training_loss(trainer: Trainer, module: LightningModule, batch: Any) -> Tensor | None:
    """What ``training_step`` returns as the loss of a batch; None if it skips the batch."""
    arguments: Any = trainer.fit_loop.epoch_loop._build_kwargs({}, batch, 0)  # pyright: ignore[reportArgumentType]
    with trainer.precision_plugin.train_step_context():
        output = module.training_step(*arguments.values())
    return output["loss"] if isinstance(output, Mapping) else output


def row_size(row: Any) -> int:
    """Numbers and characters that a row of a dataset holds."""
    if isinstance(row, Tensor):
        return row.numel()
    if isinstance(row, (str, bytes)):
        return len(row)
    if isinstance(row, Mapping):
        return sum(map(row_size, row.values()))
    if isinstance(row, (list, tuple)):
        return sum(map(row_size, row))
    size = getattr(row, "size", 1)  # numpy arrays
    return size if isinstance(size, int) else 1


def step_fits(trainer: Trainer, module: LightningModule, loader: DataLoader[Any], num_rows: int) -> bool:
    """Whether a step of the longest ``num_rows`` rows fits: forward, backward, and the optimizer's state.

    The module is called directly, not through its wrapper, so that ranks need not try the same.
    """
    try:
        with untouched(trainer, module):
            _step(trainer, module, longest_batch(trainer, loader, num_rows))
        fits = True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Memory is freed after this block: until then the error keeps every activation alive.
        fits = False
    gc.collect()
    torch.cuda.empty_cache()
    return fits


@contextmanager
def untouched(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Restore weights, buffers, gradients, optimizers, attributes and random numbers on exit; log nothing inside.

    Attributes of every submodule are restored, and so counters, open loss windows and metrics. The object that an
    attribute refers to is restored too if it is a tensor, list, dictionary or set.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    tensors = [(tensor, _copy(tensor)) for tensor in trained]
    optimizers = [(optimizer, _optimizer_state(optimizer)) for optimizer in trainer.optimizers]
    try:
        with observed(trainer, module):
            yield
    finally:
        for parameter in trained:
            parameter.grad = None
        _restore_tensors(tensors)
        for optimizer, (state, groups) in optimizers:
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.update(before)


@contextmanager
def observed(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Restore buffers, attributes and random numbers on exit, and log nothing inside; for passes without a step.

    Attributes are those of `untouched`, and among them whether each submodule trains or evaluates.
    """
    buffers = [(tensor, _copy(tensor)) for tensor in module.buffers()]
    attributes = [
        (child, {name: (value, _copy(value)) for name, value in child.__dict__.items()}) for child in module.modules()
    ]
    for child in module.modules():
        if isinstance(child, LightningModule):
            child.__dict__["log"] = _no_log
    try:
        with kept_random_state(trainer.strategy.root_device):
            yield
    finally:
        for child, values in attributes:
            _restore_attributes(child, values)
        _restore_tensors(buffers)


def _step(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    def closure() -> Any:
        loss = training_loss(trainer, module, batch)
        if loss is not None:
            module.backward(loss)
        return loss

    for optimizer in trainer.optimizers:
        optimizer.step(closure)


def _restore_tensors(tensors: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    with torch.no_grad():
        for tensor, before in tensors:
            if before is not None:
                tensor.copy_(before)


def _no_log(*_: Any, **__: Any) -> None:
    """Replaces ``LightningModule.log``, so that the numbers of a trial do not reach the loggers."""


def _optimizer_state(optimizer: Optimizer) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    state = {parameter: copy.deepcopy(own) for parameter, own in optimizer.state.items()}
    settings = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    return state, copy.deepcopy(settings)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None if value.is_inference() else value.detach().to("cpu", copy=True)
    return copy.copy(value) if type(value) in (list, dict, set) else None


def _restore_attributes(module: nn.Module, values: Mapping[str, tuple[Any, Any]]) -> None:
    for value, before in values.values():
        if isinstance(before, Tensor):
            value.detach().copy_(before)
        elif before is not None:
            value.clear()
            (value.extend if isinstance(before, list) else value.update)(before)
    module.__dict__.clear()
    module.__dict__.update({name: value for name, (value, _) in values.items()})
