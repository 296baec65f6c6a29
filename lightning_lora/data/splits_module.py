"""What every data module of this package does: rows of the splits that a stage needs, in an order of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_lora.data.bad_rows import check_action
from lightning_lora.errors import DataSettingError, check_count, no_effect

Names = str | list[str]
"""Files, globs or hub names."""
Sources = Names | Mapping[str, float] | None
"""Names, or a mapping from names to shares; None for a split without rows."""

_STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("test",)}
"""The splits of each stage; the first one is required."""


class SplitsDataModule(LightningDataModule):
    """Loads the splits ``train``, ``validation`` and ``test`` that a stage needs.

    A subclass puts the rows of each into ``rows`` in ``setup``, and makes loaders by ``train_dataloader`` and
    `_in_file_order`.

    Args:
        sources: The sources of ``train``, ``validation`` and ``test``.
        limits: Most rows of each split, from the first; None takes all.
        tokenizer: A folder, a hub name or a tokenizer. None takes the tokenizer of the model that is trained.
        seed: Seeds the order of the training rows.
        on_bad_row: ``"error"`` stops if rows cannot be used, ``"skip"`` leaves them out.
        batch_size: Rows in a batch on each device.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    kind = "rows"
    """What a split holds, for messages."""

    def __init__(
        self,
        sources: dict[str, Sources],
        limits: dict[str, int | None],
        tokenizer: str | PreTrainedTokenizerBase | None,
        seed: int,
        on_bad_row: str,
        batch_size: int,
    ) -> None:
        super().__init__()
        check_count("batch_size", batch_size, DataSettingError)
        check_count("seed", seed, DataSettingError, least=0)
        check_count("max_rows", limits["train"], DataSettingError, optional=True)
        check_count("validation_rows", limits["validation"], DataSettingError, optional=True)
        self.sources = sources
        self.limits = limits
        self.tokenizer = tokenizer
        self.seed = seed
        self.on_bad_row = check_action(on_bad_row)
        self.batch_size = batch_size
        self.rows: dict[str, Any] = {}
        if not self._has("validation"):
            # Lightning then logs that validation is skipped, instead of warning about a loader of length zero.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        """Validation rows in the order of the files, each on one device; an empty list without ``validation``."""
        return self._in_file_order("validation", *self._share()) if self._has("validation") else []

    @override
    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Test rows in the order of the files, each on one device."""
        return self._in_file_order("test", *self._share())

    @override
    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Test rows in the order of the files."""
        return self._in_file_order("test")  # which Lightning divides among devices, and repeats none

    def _in_file_order(self, split: str, num_devices: int = 1, device: int = 0) -> DataLoader[dict[str, Any]]:
        """The loader of a device for its share of the rows, by `each_once`."""
        raise NotImplementedError

    def _tell_unused(self, kind: type[SplitsDataModule], given: Mapping[str, Any], *of_training: str) -> None:
        """Warn of settings of a split without rows, of which ``of_training`` are about training rows only."""
        for split, names in {"train": of_training, "validation": ("validation_rows",)}.items():
            if not self._has(split) and (told := no_effect(kind, given, names, f"no {split} {self.kind} are given")):
                rank_zero_warn(told, stacklevel=4)

    def _has(self, split: str) -> bool:
        return self.sources[split] is not None

    def _splits(self, stage: str | None) -> list[str]:
        """The splits of a stage; of all stages for None.

        Raises:
            ConfigError: If the split that the stage needs is not given.
        """
        given = [split for split in self.sources if self._has(split)]
        if stage is None:
            return given
        needed, *optional = _STAGES[stage]
        if needed not in given:
            name = getattr(stage, "value", stage)  # Lightning gives a member of an enumeration
            raise DataSettingError(f"{name} needs {needed} {self.kind}: give {needed}= files or a hub name.")
        return [needed, *(split for split in optional if split in given)]

    def _loaded(self, split: str) -> Any:
        if split not in self.rows:
            raise DataSettingError(f"no {split} {self.kind} are loaded; give {split}= and call setup() first.")
        return self.rows[split]

    def _module(self) -> LightningModule | None:
        return self.trainer.lightning_module if self.trainer else None

    def _share(self) -> tuple[int, int]:
        """``num_replicas`` and ``rank`` of a sampler: the part of the training rows that this process draws."""
        found = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (found["num_replicas"], found["rank"]) if found else (1, 0)


def scrambled(seed: int) -> int:
    """A number for a sampler's seed that shares no order with those of other seeds."""
    # DistributedSampler adds the epoch to its seed, and torch keeps 32 bits of the sum. Epoch 1 of seed 0 must differ
    # from epoch 0 of seed 1, and seed 2**32 from seed 0.
    return random.Random(seed).getrandbits(32)
