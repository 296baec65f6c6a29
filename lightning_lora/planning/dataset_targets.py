"""Reads the targets of a dataset that is not ours, by its structure, without its loader."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset, default_collate, default_convert

from lightning_lora.data.batches.collate import IGNORE_INDEX

KEYS = ("labels", "label", "y", "target", "targets")
"""Names of the targets in a mapping, and, the plurals, of the targets of all rows in a dataset."""
_TOGETHER = 1000
SECONDS = 20.0
"""Longest time for reading items; of more items than that allows, a random sample is read."""


@dataclass(frozen=True)
class RowTargets:
    """The targets of some rows of equal shape.

    Args:
        values: Integer targets, ``(rows, ...)``; -100 where there is no loss.
        digests: A 64-bit hash of everything in each row, ``(rows,)``; None where only the targets were read.
        lengths: Tokens of each row if the targets are the row's own tokens, ``(rows,)``; None otherwise.
    """

    values: numpy.ndarray
    digests: numpy.ndarray | None
    lengths: numpy.ndarray | None = None


class UnknownTargetsError(Exception):
    """The targets are no integers, or nothing tells which part of a row they are."""


def read_targets(
    dataset: Any, rows: numpy.ndarray, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator[RowTargets]:
    """Read the targets of some rows, in no particular order.

    What a dataset holds in memory is read there, anything else item by item. If reading all items would take more than
    `SECONDS`, only the targets are read where the dataset lists them, and else those of a random sample of the rows.

    Args:
        rows: The numbers of the rows, at least one.
        collate: What makes a batch of the items, if it may change them.

    Raises:
        UnknownTargetsError: If the targets are no integers, or nothing tells which part of a row they are.
    """
    if collate is None and _lists_targets(dataset, with_content=True):
        return _listed(dataset, rows)
    affordable = _affordable(dataset, rows, collate)
    if affordable >= len(rows):
        return _items(dataset, rows, collate)
    if collate is None and _lists_targets(dataset, with_content=False):
        return _listed(dataset, rows)
    return _items(dataset, numpy.random.default_rng(0).permutation(rows)[:affordable], collate)


def _affordable(dataset: Any, rows: numpy.ndarray, collate: Callable[[list[Any]], Any] | None) -> int:
    """How many items can be read in `SECONDS`."""
    few = rows[:: -(-len(rows) // 20)]
    start = time.perf_counter()
    for _ in _items(dataset, few, collate):
        pass
    return int(SECONDS * len(few) / (time.perf_counter() - start))


def _lists_targets(dataset: Any, with_content: bool) -> bool:
    """Whether the targets of all rows, and all the rest of them, can be read without the items."""
    if isinstance(dataset, Subset):
        return _lists_targets(dataset.dataset, with_content)
    if isinstance(dataset, ConcatDataset):
        return all(_lists_targets(part, with_content) for part in dataset.datasets)
    if isinstance(dataset, TensorDataset):
        return len(dataset.tensors) > 1
    return (not with_content or _content(dataset) is not None) and _targets_of_all(dataset) is not None


def _listed(dataset: Any, rows: numpy.ndarray) -> Iterator[RowTargets]:
    if isinstance(dataset, Subset):
        yield from _listed(dataset.dataset, numpy.asarray(dataset.indices)[rows])
    elif isinstance(dataset, ConcatDataset):
        starts = [0, *dataset.cumulative_sizes]
        for part, start, end in zip(dataset.datasets, starts, starts[1:], strict=False):
            yield from _listed(part, rows[(rows >= start) & (rows < end)] - start)
    elif isinstance(dataset, TensorDataset):
        yield from _stored(dataset.tensors[-1], dataset.tensors, rows)
    else:
        targets, inputs = _targets_of_all(dataset), _content(dataset)
        yield from _stored(targets, None if inputs is None else (inputs, targets), rows)


def _content(dataset: Any) -> Any:
    """The inputs of all rows that a dataset holds in ``data``; None if it does not."""
    inputs = getattr(dataset, "data", None)
    return inputs if isinstance(inputs, (Tensor, numpy.ndarray)) and len(inputs) == len(dataset) else None


def _stored(targets: Any, content: Sequence[Any] | None, rows: numpy.ndarray) -> Iterator[RowTargets]:
    """Rows of which targets and content are in memory."""
    for start in range(0, len(rows), _TOGETHER):
        some = torch.from_numpy(rows[start : start + _TOGETHER])
        yield RowTargets(_integers(_at(targets, some)), None if content is None else _digests(content, some))


def _at(values: Any, rows: Tensor) -> Any:
    return values[rows.to(values.device)] if isinstance(values, Tensor) else values[rows.numpy()]


def _digests(content: Sequence[Any], rows: Tensor) -> numpy.ndarray:
    parts = [torch.as_tensor(_at(part, rows)).detach().cpu().reshape(len(rows), -1).contiguous() for part in content]
    together = torch.cat([part.view(torch.uint8).reshape(len(rows), -1) for part in parts], 1).numpy()
    return _hashes(map(memoryview, together))


def _hashes(contents: Iterable[Any]) -> numpy.ndarray:
    digests = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return numpy.frombuffer(digests, dtype=numpy.uint64)


def _targets_of_all(dataset: Any) -> numpy.ndarray | None:
    """The targets that a dataset lists in an attribute; None if it has none, or if its items have others."""
    for name in ("targets", "labels"):
        listed = getattr(dataset, name, None)
        if isinstance(listed, (list, tuple, Tensor, numpy.ndarray)) and len(listed) == len(dataset) > 0:
            values = _array(listed)
            # A transform may change targets: the items tell.
            some = 0, len(dataset) // 2, len(dataset) - 1
            if values is not None and values.dtype.kind in "iub" and all(_agrees(dataset[i], values[i]) for i in some):
                return values
    return None


def _agrees(item: Any, target: numpy.ndarray) -> bool:
    found = _array(target_of(item))
    return found is not None and found.shape == target.shape and bool((found == target).all())


def _items(dataset: Any, rows: numpy.ndarray, collate: Callable[[list[Any]], Any] | None) -> Iterator[RowTargets]:
    for start in range(0, len(rows), _TOGETHER):
        numbers = rows[start : start + _TOGETHER].tolist()
        if hasattr(dataset, "__getitems__"):
            items: Iterable[Any] = dataset.__getitems__(numbers)
        else:
            items = (dataset[number] for number in numbers)
        for item in items:
            digest = hashlib.blake2b(digest_size=8)
            hashable = _feed(digest, item)
            whole = item if collate is None else collate([item])
            values = _integers(target_of(whole))
            tokens = _own_tokens(whole, values)
            yield RowTargets(
                values=(values if tokens is None else tokens[1]).reshape(1, -1),
                digests=numpy.frombuffer(digest.digest(), dtype=numpy.uint64) if hashable else None,
                lengths=None if tokens is None else numpy.array([tokens[0]]),
            )


def plain_collate(collate: Any) -> bool:
    """Whether a loader puts items together as they are."""
    return collate in (None, default_collate, default_convert)


def target_of(item: Any) -> Any:
    """The part of an item or a batch that is its target; None if nothing tells which it is."""
    if isinstance(item, Mapping):
        return next((item[key] for key in KEYS if key in item), None)
    return item[-1] if isinstance(item, (tuple, list)) and len(item) > 1 else None


def _own_tokens(item: Any, labels: numpy.ndarray) -> tuple[int, numpy.ndarray] | None:
    """Number of tokens and labels of a row that is trained to continue its own tokens; None for any other row."""
    ids = _array(item["input_ids"]) if isinstance(item, Mapping) and "input_ids" in item else None
    if ids is None or ids.shape != labels.shape or not labels.ndim:
        return None
    trained = labels != IGNORE_INDEX
    # The first token of a row is predicted from nothing.
    return (labels.size, labels[..., 1:]) if (labels[trained] == ids[trained]).all() else None


def _integers(target: Any) -> numpy.ndarray:
    values = _array(target)
    if values is None or values.dtype.kind not in "iub":
        raise UnknownTargetsError
    return values.astype(numpy.int64)


def _array(value: Any) -> numpy.ndarray | None:
    if value is None or isinstance(value, (str, bytes, Mapping)):
        return None
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.float().numpy() if value.dtype is torch.bfloat16 else value.numpy()
    try:
        return numpy.asarray(value)
    except ValueError:  # lists of different lengths
        return None


def _feed(digest: Any, value: Any) -> bool:
    """Add all of a value to a hash; False if it holds something of which the content is not known."""
    if isinstance(value, Mapping):
        return all([_feed(digest, part) for pair in value.items() for part in pair])
    if isinstance(value, (tuple, list)):
        digest.update(f"{len(value)} of".encode())
        return all([_feed(digest, part) for part in value])
    if value is None or isinstance(value, (str, bytes, int, float, complex)):
        digest.update(repr(value).encode())
        return True
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.kind in "iufcbSU":
        digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
        return True
    if type(value).__module__.partition(".")[0] == "PIL":
        image: Any = value
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        return True
    return False
