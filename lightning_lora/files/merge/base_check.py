"""The check that a checkpoint holds the weights an adapter was trained on, made while they are read for merging."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.errors import BaseMismatchError
from lightning_lora.files.merge.plan import MergePlan
from lightning_lora.lora.fingerprint import PiecewiseDigest

_NOTHING = torch.empty(0, dtype=torch.int64)


class BaseCheck:
    """Compares the digest of every adapted weight with the manifest, even if several files hold parts of the weight.

    Args:
        active: False lets every base pass. A base also passes if the adapter has no manifest.
    """

    def __init__(self, plan: MergePlan, active: bool) -> None:
        self._plan = plan
        # A weight that the adapter brings along has no digest.
        layers = plan.folder.manifest.layers if active else {}
        self._entries = {name: entry for name, entry in layers.items() if entry.base is not None}
        # The weights that were read in part.
        self._digests: dict[str, PiecewiseDigest] = {}

    def part(self, name: str, shape: tuple[int, ...]) -> PartCheck:
        """The check of the stored tensor ``name``, which must be given all its elements in order."""
        weight = self._plan.weight(name)
        if weight is None or weight not in self._entries:
            return PartCheck()
        part = self._plan.experts.get(name)
        if weight not in self._digests:
            self._digests[weight] = PiecewiseDigest(shape if part is None else part.fused.shape)
        digest = self._digests[weight]
        numbers = torch.arange(digest.missing)
        positions, numbers = (numbers * digest.step, numbers) if part is None else part.sampled(digest.step)
        return PartCheck(digest, positions, numbers)

    def finish(self, name: str) -> None:
        """Finish the check of the stored tensor ``name`` once all its elements were read.

        Raises:
            BaseMismatchError: If this completes a weight, and the adapter was trained on another one.
        """
        weight = self._plan.weight(name)
        if weight is None or weight not in self._entries or self._digests[weight].missing:
            return
        found, entry = self._digests.pop(weight).print(), self._entries[weight]
        known = self._plan.folder.manifest.base.get(entry.parameter)
        if found.digest != entry.base and not (known is not None and known.agrees(found)):
            raise BaseMismatchError(
                f"{name if name in self._plan.matrices else weight} is not the weight the adapter was trained on "
                f"(digest {found.digest}, expected {entry.base}). Give the right base, or pass --allow_other_base."
            )


class PartCheck:
    """Adds to a digest those elements of one stored tensor that it samples; without a digest it does nothing.

    Args:
        digest: The digest of the weight.
        positions: Positions of the sampled elements in the stored tensor, ascending.
        numbers: Their numbers among the sampled elements of the whole weight.
    """

    def __init__(
        self, digest: PiecewiseDigest | None = None, positions: Tensor = _NOTHING, numbers: Tensor = _NOTHING
    ) -> None:
        self._digest, self._positions, self._numbers = digest, positions, numbers
        self._num_read = 0

    def add(self, elements: Tensor) -> None:
        """Add the next elements of the tensor, ``(elements)``."""
        start, self._num_read = self._num_read, self._num_read + len(elements)
        if self._digest is not None:
            count = int(torch.searchsorted(self._positions, self._num_read))
            self._digest.add(self._numbers[:count], elements[self._positions[:count] - start])
            self._positions, self._numbers = self._positions[count:], self._numbers[count:]
