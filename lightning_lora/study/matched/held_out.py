"""Scores a trained module on held-out rows, row by row, in the two halves of a study."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_lora.errors import ResultFileError
from lightning_lora.study.matched.measures.curve import validation_metric
from lightning_lora.study.matched.measures.evaluations import batch_losses
from lightning_lora.study.matched.outcomes import as_losses
from lightning_lora.study.matched.record import RowLosses


def held_out_losses(
    trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None
) -> tuple[RowLosses, str]:
    """The losses of a module on the validation rows of a run, and a hash of what these rows hold.

    Rows come from ``predict_step`` if it returns a mapping with the mean ``loss`` of each row and, where rows have
    several, their ``tokens``. Any other module is validated on each half of the rows, and each half counts as one row.

    Raises:
        DataError: If there are no validation rows, or too few for two halves.
    """
    # All rows are scored in every arm, however few the validations of its runs take.
    trainer.limit_predict_batches = trainer.limit_val_batches = 1.0
    loader = _validation_loader(trainer, module, datamodule)
    dataset: Any = loader.dataset
    places = range(len(dataset))
    contents = [row_content(dataset[place]) for place in places]
    halves, rows_hash = selection_rows(contents), hashlib.sha256(b"".join(contents)).hexdigest()
    if halves.all() or not halves.any():
        raise ResultFileError(
            f"one half of the held-out rows chooses learning rates and the other one is for the verdict: {len(places)} "
            f"validation rows are too few, or all alike."
        )
    # Rows come from the loader: the data module would be asked for data of the stage that it may not have.
    trainer.datamodule = None  # pyright: ignore[reportAttributeAccessIssue]
    if (rows := _by_row(trainer, module, loader)) is not None:
        return as_losses(*rows, torch.from_numpy(halves)), rows_hash
    means = [_mean_loss(trainer, module, _subset(loader, np.flatnonzero(halves == half))) for half in (True, False)]
    return as_losses(torch.tensor(means, dtype=torch.float64), torch.ones(2), torch.tensor([True, False])), rows_hash


def row_content(row: Any) -> bytes:
    """A hash of what a row holds, whatever it is made of."""
    digest = hashlib.sha256()
    _digest(row, digest)
    return digest.digest()


def _digest(value: Any, digest: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            _digest(value[key], digest)
    elif isinstance(value, (list, tuple)) and any(isinstance(each, (Tensor, Mapping, list, tuple)) for each in value):
        for each in value:
            _digest(each, digest)
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    else:
        digest.update(repr(value).encode())


def _validation_loader(trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> DataLoader[Any]:
    loaders = trainer.val_dataloaders
    if loaders is None:
        trainer.validate(module, datamodule=data, verbose=False)
        loaders = trainer.val_dataloaders
    if isinstance(loaders, (list, tuple)) and len(loaders) == 1:
        loaders = loaders[0]
    if not isinstance(loaders, DataLoader) or isinstance(loaders.dataset, IterableDataset):
        raise ResultFileError(
            "a study scores its runs on held-out rows: give the data one validation set that has a length."
        )
    if not isinstance(loaders.dataset, Sized):
        raise ResultFileError("a study scores its runs on held-out rows, and the validation set has no length.")
    return loaders


def _subset(loader: DataLoader[Any], places: Any, batch_size: int | None = None) -> DataLoader[Any]:
    subset = Subset(loader.dataset, [int(place) for place in places])
    return DataLoader(subset, batch_size or loader.batch_size or 1, collate_fn=loader.collate_fn)


def _by_row(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> tuple[Tensor, Tensor] | None:
    """``(rows,)`` sums of losses and numbers of tokens; None if ``predict_step`` gives none."""
    if type(module).predict_step is LightningModule.predict_step:
        return None
    count = len(loader.dataset)  # pyright: ignore[reportArgumentType]
    for size in (loader.batch_size or 1, 1):  # a mean over a batch is a row of its own only in a batch of one
        found = trainer.predict(module, _subset(loader, range(count), size)) or []
        given = [each for each in map(batch_losses, found) if each is not None]
        if len(given) < len(found):
            return None
        losses = torch.cat([each.cpu() for each, _ in given])
        if len(losses) == count:
            tokens = [each.cpu() for _, each in given if each is not None]
            if len(tokens) < len(given):
                return losses, torch.ones(count)
            counts = torch.cat(tokens)
            return losses * counts, counts
    return None


def _mean_loss(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> float:
    (metrics,) = trainer.validate(module, loader, verbose=False)
    name = validation_metric(metrics)
    if name is None:
        raise ResultFileError(
            f"{type(module).__name__} gives no loss on held-out rows: let validation_step log 'val_loss', or let "
            f"predict_step return a mapping with the loss of each row."
        )
    return float(metrics[name])


def selection_rows(rows: Sequence[bytes | str]) -> NDArray[np.bool_]:
    """Whether each row is for selection: about half of them, by a hash of what is in the row.

    The same row is on the same side in every study, whatever the order, and so are its duplicates.

    Args:
        rows: The content of each row, such as its text or the bytes of its tokens.
    """
    contents = (row.encode() if isinstance(row, str) else row for row in rows)
    return np.array([hashlib.sha256(content).digest()[0] % 2 == 0 for content in contents], dtype=bool)
