"""What a training step keeps in memory to be faster, or computes again to hold less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lightning_lora.errors import TaskSettingError, check_choice, did_you_mean

AUTO = "auto"
GATES = ("keep", "recompute")
"""The faster one first."""


@dataclass(frozen=True)
class StepMemory:
    """Three choices between the time and the memory of a training step; none changes what is learnt.

    ``"auto"`` is chosen by `MemoryChoice` before the first step, from what the device has room for. Without that
    callback, on a CPU, and where a device does not tell its memory, it is the one that holds least but for
    checkpointing: the gate is computed again, a chunk has 512 rows, and no block is computed twice.

    Args:
        gate: ``"keep"`` or ``"recompute"`` the product ``activation(gate) * up`` that the last layer of a gated
            feed-forward network receives, if that layer is adapted. Recomputed, two tensors of its width are held for
            the backward pass instead of four.
        head_rows: Rows of which the loss at the head holds logits at a time while it trains, at least 1. More are
            faster on a GPU, and hold 4 bytes more for each class and row, or 6 below float32.
        activation_checkpointing: Whether blocks keep their input only, and are computed again in the backward pass.

    Raises:
        ConfigError: If a value is none of these.

    Example:
        >>> StepMemory(gate="keep", head_rows=2048)
        StepMemory(gate='keep', head_rows=2048, activation_checkpointing='auto')
    """

    gate: str = AUTO
    head_rows: int | str = AUTO
    activation_checkpointing: bool | str = AUTO

    def __post_init__(self) -> None:
        check_choice("step_memory: gate", self.gate, (AUTO, *GATES))
        rows, again = self.head_rows, self.activation_checkpointing
        if rows != AUTO and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise TaskSettingError(
                f"step_memory: head_rows must be 'auto' or a number of rows, 1 or more, got {rows!r}."
            )
        if again != AUTO and not isinstance(again, bool):
            raise TaskSettingError(
                f"step_memory: activation_checkpointing must be 'auto', true or false, got {again!r}."
            )

    @classmethod
    def from_dict(cls, settings: StepMemory | Mapping[str, Any] | None) -> StepMemory:
        """Make it from a mapping of fields to values; None leaves all open, a `StepMemory` is returned unchanged.

        Raises:
            ConfigError: If a name is no field, or a value is refused.
        """
        if isinstance(settings, StepMemory):
            return settings
        if settings is not None and not isinstance(settings, Mapping):
            raise TaskSettingError(
                f"step_memory must be a StepMemory, a mapping or None, got {type(settings).__name__}."
            )
        known = [field.name for field in fields(cls)]
        for name in settings or {}:
            if name not in known:
                raise TaskSettingError(
                    f"step_memory has no setting {name!r}{did_you_mean(str(name), known)} Known: {', '.join(known)}."
                )
        return cls(**(settings or {}))

    def with_checkpointing(self, given: bool | None) -> StepMemory:
        """The same with the setting ``activation_checkpointing`` of a task, which is older; None: as it is.

        Raises:
            ConfigError: If the two contradict each other.
        """
        if given is not None and self.activation_checkpointing not in (AUTO, given):
            raise TaskSettingError(
                f"activation_checkpointing={given} and {self.activation_checkpointing} in step_memory contradict each "
                f"other: give one of the two."
            )
        return self if given is None else replace(self, activation_checkpointing=given)

    @property
    def chunk_rows(self) -> int | None:
        """``head_rows`` as `head_loss` takes it: None if it is open."""
        return None if isinstance(self.head_rows, str) else self.head_rows

    def to_dict(self) -> dict[str, Any]:
        """The choices as plain types, for YAML, JSON and checkpoints."""
        return asdict(self)

    def made(self) -> list[str]:
        """Names of the choices that are not left open."""
        return [name for name, value in asdict(self).items() if value != AUTO]

    def __str__(self) -> str:
        gate = {"keep": "gates kept", "recompute": "gates computed again"}
        again = {True: "activation checkpointing", False: "no activation checkpointing"}
        told = [
            gate.get(self.gate),
            None if self.head_rows == AUTO else f"head chunks of {self.head_rows:,} rows",
            again.get(self.activation_checkpointing),  # pyright: ignore[reportArgumentType]
        ]
        return ", ".join(each for each in told if each) or "nothing chosen"
