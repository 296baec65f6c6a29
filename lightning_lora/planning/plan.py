"""A plan before training: counts, capacity, method, settings, memory and cost, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_lora.errors import PlanError
from lightning_lora.memory.parts import MemoryParts
from lightning_lora.planning.advice.config_file import write_config
from lightning_lora.planning.advice.page import page
from lightning_lora.planning.capacity import CapacityRow
from lightning_lora.planning.data_counts import DataCounts
from lightning_lora.planning.reason import Reason


@dataclass(frozen=True)
class Plan:
    """What to train, how, and at what cost; ``print(plan)`` shows it on one page.

    Args:
        model: The model in words.
        data: Counts of the training rows.
        capacity: Ratios and verdict for each rank and target set, as if every target had to be memorised.
        method: ``"lora"``, ``"qlora"`` or ``"full"``.
        fits: Whether the method fits into the memory of the devices.
        sentence: The verdict in words.
        settings: ``rank``, ``learning_rate`` (of full fine-tuning), ``batch_size`` (rows of a micro-batch),
            ``accumulate_grad_batches``, ``devices``, ``strategy``, ``precision``, ``rows_per_step``, ``steps`` and
            ``step_memory`` (choices of `StepMemory`; None where a run has nothing to choose, as on a CPU).
        memory: Bytes on one device by method; None where a method is not available, or is in ``not_traced``.
        seconds: Time of all steps; None if it is not known.
        cost: Parameters, operations, disk and time in words.
        topics: Reasons, each with the part of the page it belongs to.
        notes: What else to know.
        budget: Bytes of one device.
        targets: The adapted layers.
        lr_multiplier: What adapters multiply the learning rate by.
        length: How long the run is, in words.
        sureness: How sure the numbers are.
        config: Settings of ``fit``; None if they are not known.
        config_reasons: Reasons by dotted name of a setting.
        numbers: What else is told in `to_dict`.
        not_traced: Methods whose memory could not be traced, with the reason.
        no_config: Why the settings of ``fit`` are not known; None if they are, or objects did not keep their arguments.
    """

    model: str
    data: DataCounts
    capacity: tuple[CapacityRow, ...]
    method: str
    fits: bool
    sentence: str
    settings: dict[str, Any]
    memory: dict[str, MemoryParts | None]
    seconds: float | None
    cost: str
    topics: tuple[tuple[str, Reason], ...]
    notes: tuple[str, ...]
    budget: int
    targets: str
    lr_multiplier: float
    length: str
    sureness: str
    config: Mapping[str, Any] | None = None
    config_reasons: Mapping[str, Reason] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    not_traced: Mapping[str, str] = field(default_factory=dict)
    no_config: str | None = None

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why each value was chosen, and who says so."""
        return tuple(reason for _, reason in self.topics)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain types, as ``plan.json`` holds it."""
        return {
            "model": self.model,
            "verdict": self.sentence,
            "fits": self.fits,
            "data": asdict(self.data),
            "capacity": [asdict(row) for row in self.capacity],
            "method": self.method,
            "settings": dict(self.settings),
            "memory": {name: parts and parts.to_dict() for name, parts in self.memory.items()},
            "not_traced": dict(self.not_traced),
            "seconds": self.seconds,
            "reasons": [asdict(reason) for reason in self.reasons],
            "notes": list(self.notes),
            **self.numbers,
        }

    def write_config(self, path: str | Path) -> Path:
        """Write the YAML that ``lightning-lora fit --config`` runs; each value carries its reason and source.

        Raises:
            ConfigError: If nothing fits, or the settings of ``fit`` are not known.
        """
        if not self.fits:
            raise PlanError(f"no config is written: {self.sentence}")
        if self.no_config is not None:
            raise PlanError(f"no config is written: {self.no_config}.")
        if self.config is None:
            raise PlanError(
                "no config is written: it needs the classes and arguments of model, data module and callbacks. "
                "Give them by config (lightning-lora plan --config FILE), or use a module that calls "
                "save_hyperparameters()."
            )
        heading = f"Written by lightning-lora plan. Run it:\n  lightning-lora fit --config {path}\n{self.sentence}"
        return write_config(path, self.config, self.config_reasons, heading)

    def __str__(self) -> str:
        return page(self)
