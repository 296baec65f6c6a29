"""What a run was planned to take, beside what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_lora.batch.counting import count_items, count_rows, count_supervised
from lightning_lora.batch.run_events import RunEvents
from lightning_lora.errors import CallbackSettingError, check_arguments
from lightning_lora.lora.reports import count_parameters
from lightning_lora.memory.process_peak import peak_bytes, resident_bytes, restart_peak
from lightning_lora.sharding.collectives import total_of_ranks

_KEY = "lightning_lora_planned_run"
# Of the part before a checkpoint: Lightning calls no callback where the earlier part had none.
_NOTHING: dict[str, float | None] = {"tokens": 0, "total_tokens": 0, "seconds": 0.0}
_NOT_COUNTED: dict[str, float | None] = dict.fromkeys(_NOTHING)
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class _Row:
    name: str
    planned: float | None
    measured: float | None
    is_exact: bool
    note: str = ""

    def cells(self) -> tuple[str, str, str, str]:
        return self.name, self._shown(self.planned), self._shown(self.measured), self._remark()

    def _shown(self, value: float | None) -> str:
        if value is None:
            return "-"
        if self.name == "peak memory":
            size, unit = next(((size, unit) for size, unit in _UNITS if value >= size), (1, "bytes"))
            return f"{value / size:,.4g} {unit}"
        return f"{value:,.0f}" if self.is_exact else f"{value:,.3g}"

    def _remark(self) -> str:
        if self.planned is None or self.measured is None:
            return self.note if self.measured is None else ""
        if self.is_exact:
            return "as planned" if self.planned == self.measured else self.note
        apart = f"{self.measured / self.planned - 1:+.0%}" if self.planned else ""
        return "; ".join(filter(None, [apart, self.note]))


class PlannedRun(Callback):
    """Prints what a run was planned to take beside what it took, when it ends or is stopped.

    ``lightning-lora plan --write-config`` puts it into the config. Steps, tokens and trained parameters are exact;
    where they differ from the plan, the likely reason is said. The numbers also go into ``events.jsonl``
    in the run folder. Tokens are those of all processes and of all parts of a run that was continued; memory and
    seconds are those of the first process, seconds of all parts. Without arguments only the measured numbers are told.

    Memory is the peak that torch allocated on the GPU during training: weights, adapters, gradients, optimizer and
    activations, and not the context of CUDA, nor what the allocator keeps for later, which the planned peak leaves out
    too. On a CPU it is what the resident memory of the process grew by at its peak, since before the model was built,
    which has what libraries load, and holes between blocks, on top. Seconds are those from the first step to the last,
    with validation and checkpoints; the planned ones have no checkpoints.

    Args:
        steps: Planned optimizer steps.
        tokens: Planned supervised tokens of the whole run; rows, where data has no tokens.
        trained_parameters: Planned number of trained parameters.
        peak_bytes: Planned peak memory of a device.
        seconds: Planned seconds of training with validation.
        total_tokens: Planned tokens of the whole run, those without a loss too, without padding.

    Raises:
        ConfigError: If a number is negative.
    """

    def __init__(
        self,
        steps: int | None = None,
        tokens: int | None = None,
        trained_parameters: int | None = None,
        peak_bytes: int | None = None,
        seconds: float | None = None,
        total_tokens: int | None = None,
    ) -> None:
        check_arguments(PlannedRun, locals(), CallbackSettingError)
        self.planned: dict[str, float | None] = {
            "steps": steps,
            "tokens": tokens,
            "total_tokens": total_tokens,
            "trained_parameters": trained_parameters,
            "peak_bytes": peak_bytes,
            "seconds": seconds,
        }
        for name, value in self.planned.items():
            if value is not None and not value >= 0:
                raise CallbackSettingError(f"{name} of PlannedRun must not be negative, got {value}.")
        self.measured: dict[str, float | None] = {}
        self._clock = time.perf_counter
        self._earlier: dict[str, float | None] = dict(_NOTHING)
        self._restart()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the memory before the model is built."""
        if stage == "fit":
            self._restart()
            self._earlier = dict(_NOT_COUNTED if trainer.ckpt_path else _NOTHING)
            restart_peak(torch.device("cpu"))
            self._resident, self._peak_before = resident_bytes(), peak_bytes(torch.device("cpu"))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and the measurement of memory."""
        self._events = RunEvents(trainer, "PlannedRun")
        self._trained = count_parameters(pl_module).trainable
        if pl_module.device.type == "cuda":
            restart_peak(pl_module.device)
        self._start, self._is_running = self._clock(), True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens of a batch; a count on a GPU stays there."""
        tokens = count_supervised(batch)
        self._tokens = self._tokens + (_labels(batch) if tokens is None else tokens)
        self._total = self._total + _all_tokens(batch)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell, after the last step."""
        self._tell(trainer, pl_module, (_total(trainer, self._tokens), _total(trainer, self._total)))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell of a run that was interrupted or failed."""
        # Other processes may be gone, so they are not asked.
        own = (int(self._tokens), int(self._total)) if trainer.world_size == 1 else (None, None)
        self._tell(trainer, pl_module, own, stopped=True)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save tokens and seconds so far."""
        tokens = {"tokens": _total(trainer, self._tokens), "total_tokens": _total(trainer, self._total)}
        own = tokens | {"seconds": self._seconds()}
        checkpoint[_KEY] = {name: _sum(self._earlier[name], value) for name, value in own.items()}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue with tokens and seconds of the earlier part; unknown if it ran without this callback."""
        self._earlier = _NOT_COUNTED | (checkpoint.get(_KEY) or {})

    def _restart(self) -> None:
        self._tokens: Tensor | int = 0
        self._total: Tensor | int = 0
        self._is_running = False
        self._start, self._took, self._trained = 0.0, 0.0, 0
        self._resident: int | None = None
        self._peak_before: int | None = None

    def _seconds(self) -> float:
        """Seconds of this part so far; after its end, those that it took."""
        return self._clock() - self._start if self._is_running else self._took

    def _tell(
        self, trainer: Trainer, module: LightningModule, tokens: tuple[int | None, int | None], stopped: bool = False
    ) -> None:
        """Print and write once, if there was a step."""
        if not self._is_running or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        self._took = seconds = self._seconds()
        self._is_running = False
        earlier, memory = self._earlier, self._memory(module)
        self.measured = {
            "steps": trainer.global_step,
            "tokens": _sum(earlier["tokens"], tokens[0]),
            "total_tokens": _sum(earlier["total_tokens"], tokens[1]) or None,  # 0: no tokens in these batches
            "trained_parameters": self._trained,
            "peak_bytes": memory[0],
            "seconds": _sum(earlier["seconds"], seconds),
        }
        steps_note = self._why_steps(trainer, stopped)
        rows = list(self._rows(steps_note, memory[1]))
        rank_zero_info("\n".join(_aligned(rows)))
        self._events.write(
            "planned_and_measured",
            trainer.global_step,
            {"planned": self.planned, "measured": self.measured, "stopped": stopped, "memory_is": memory[1]},
        )

    def _rows(self, steps_note: str, memory_note: str) -> Iterator[_Row]:
        is_as_planned = self.planned["steps"] == self.measured["steps"]
        tokens_note = "other rows than planned: data, max_length or drop_last" if is_as_planned else "follows the steps"
        if self.measured["tokens"] is None:
            tokens_note = "not known: an earlier part was not counted, or other processes were not asked"
        notes = {
            "steps": ("steps", True, steps_note),
            "tokens": ("tokens", True, tokens_note),
            "total_tokens": ("all tokens", True, tokens_note),
            "trained_parameters": ("parameters", True, "another model, method, rank or targets than planned"),
            "peak_bytes": ("peak memory", False, memory_note),
            "seconds": ("seconds", False, "" if is_as_planned else "follows the steps"),
        }
        for name, (shown, is_exact, note) in notes.items():
            if name == "total_tokens" and self.planned[name] is self.measured[name] is None:
                continue
            yield _Row(shown, self.planned[name], self.measured[name], is_exact, note)

    def _why_steps(self, trainer: Trainer, stopped: bool) -> str:
        if stopped:
            return "the run was stopped"
        if trainer.global_step == trainer.max_steps:
            return f"max_steps is {trainer.max_steps}"
        planned = self.planned["steps"]
        if trainer.should_stop and planned is not None and trainer.global_step < planned:
            return "the run was stopped, or a callback ended it"
        return "other data, epochs, batch size, accumulation or number of devices than planned"

    def _memory(self, module: LightningModule) -> tuple[int | None, str]:
        """The measured peak, and what it is."""
        peak = peak_bytes(module.device)
        if module.device.type == "cuda":
            return peak, "allocated by torch on the GPU"
        before = self._resident
        # The system counts the peak and the resident memory apart, to within some pages.
        if module.device.type != "cpu" or peak is None or before is None or peak <= before or peak == self._peak_before:
            return None, "not measured here, or hidden by an earlier peak of the process"
        return peak - before, "growth of the process: libraries and freed blocks count, too"


def _total(trainer: Trainer, own: Tensor | int) -> int:
    """Sum over ranks; a collective. Ranks of tensor parallelism see the same rows, which count once."""
    sampler = trainer.distributed_sampler_kwargs
    copies = trainer.world_size // int(sampler["num_replicas"]) if sampler else trainer.world_size
    return int(total_of_ranks(trainer, torch.as_tensor(own))) // max(1, copies)


def _sum(earlier: float | None, own: float | None) -> float | None:
    return None if earlier is None or own is None else earlier + own


def _labels(batch: Any) -> int:
    """Labels of a batch that is no sequence of supervised tokens, else its rows."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return labels.numel() if isinstance(labels, Tensor) else count_rows(batch)


def _all_tokens(batch: Any) -> Tensor | int:
    """Tokens of a batch without padding; 0 where it has none."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return 0
    places, labels = batch.get("position_ids"), batch.get("labels")
    if "attention_mask" in batch or not isinstance(places, Tensor) or not isinstance(labels, Tensor):
        return count_items(batch)[0]
    # Packed: each example begins at position 0, and one without a label is padding.
    example = (places == 0).flatten().long().cumsum(0)
    # By a sum, as a mask as index would wait for the device.
    labelled = torch.zeros(example.numel() + 1, dtype=torch.int64, device=example.device)
    labelled.index_add_(0, example, (labels != -100).flatten().long())
    return (labelled[example] > 0).sum()


def _aligned(rows: list[_Row]) -> Iterator[str]:
    cells = [("", "planned", "measured", ""), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    yield "planned and measured:"
    for name, planned, measured, remark in cells:
        line = f"  {name:<{widths[0]}}  {planned:>{widths[1]}}  {measured:>{widths[2]}}  {remark}"
        yield line.rstrip()
