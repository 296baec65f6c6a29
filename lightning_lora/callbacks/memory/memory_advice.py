"""Which settings of a run to lower after it ran out of memory, or before it does, and what a step takes then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_lora.batch.counting import count_rows
from lightning_lora.batch.division import divisors
from lightning_lora.batch.trial_step import is_out_of_memory
from lightning_lora.effective_batch import loader_batch_size
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.memory.candidates import frugal
from lightning_lora.memory.failures import TraceError
from lightning_lora.memory.other_settings import (
    could_recompute,
    first_rows,
    has_vocabulary,
    made_with,
    recompute,
    recomputing_method,
    with_adapters,
)
from lightning_lora.memory.room import Room
from lightning_lora.memory.run_step import RunStep, fills_device, gigabytes, room_of_run
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.mixin.memory_settings import choices_of

_LINES = 3
_MANY = 0.2
"""Share of the memory from which on logits are worth a line."""


class MemoryAdvice(Callback):
    """Adds to an out-of-memory error where the run was and the three settings whose lowering helps most.

    A step with each of them is traced (`lightning_lora.memory`) and the advice says what it takes, beside the memory
    that the device has for a step, and which micro-batch fits. Settings of which the trace says that they suffice come
    first. If the model alone takes more than half of the device's memory, the first training step is traced before it
    runs, and a warning says so if it does not fit.

    Only settings that this run can lower are named: not the batch size of a batch of one row, not the precision of a
    run in bfloat16. The rank is never named: adapters and their optimizer state are small beside activations.
    """

    _batch: Any = None
    _room: Room | None = None
    _traces: _Traces | None = None  # those of the batch that is trained on, if it was traced before
    _has_looked = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the run before."""
        self._batch = self._room = self._traces = None
        self._has_looked = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch for a trace while it is trained on; look whether the first one fits."""
        self._batch = batch
        if not self._has_looked:
            self._has_looked = True
            self._room = room_of_run(trainer, pl_module)
            if self._room is not None and fills_device(pl_module, self._room):
                self._traces = _Traces(trainer, pl_module, batch, self._room)
                _look_ahead(self._traces)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the batch go."""
        self._batch = self._traces = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Complete the message of the error, which is raised further."""
        if not is_out_of_memory(exception):
            return
        batch = None if trainer.validating else self._batch
        traces = self._traces or _Traces(trainer, pl_module, batch, self._room)
        first, *more = exception.args or ("out of memory",)
        told = [f"Out of memory {_place(trainer, pl_module)}.", *traces.words(), "Lower, in this order:"]
        text = [str(first), "", " ".join(told), *traces.lines]
        exception.args = ("\n".join(text), *more)
        self._batch = self._traces = None


def _look_ahead(traces: _Traces) -> None:
    """Warn if the step does not fit."""
    assert traces.room is not None
    if traces.now is None:
        rank_zero_info(" ".join(["whether a training step fits into memory is not known:", *traces.words()]))
    elif traces.now > traces.room.bytes:
        told = [*traces.words(), "It will probably run out of memory. Lower, in this order:"]
        rank_zero_warn("\n".join([" ".join(told), *traces.lines]))


class _Traces:
    """The step of a run with the batch at hand, traced as it is and with other settings, as far as that is possible.

    Args:
        batch: The micro-batch; None if nothing is to be traced.
        room: Memory of the device for a step; None if it is not known.

    Attributes:
        rows: Rows of the micro-batch; 0 without one.
        now: Bytes of the step as it is; None if they are not known.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, batch: Any, room: Room | None) -> None:
        self.trainer, self.module, self.room, self.failed = trainer, module, room, ""
        self.rows = 0 if room is None else count_rows(batch)
        self.share = self.rows * trainer.accumulate_grad_batches
        self._batch = lambda rows: first_rows(batch, rows, self.rows)
        self.step = RunStep(trainer, lambda: module, self._batch)
        self.now = self.bytes(self.rows, self.step) if self.rows else None

    @property
    def logits(self) -> int:
        """Bytes of logits and their gradients at the peak of the step as it is, if it is known."""
        return self.step.memory(self.rows, self.share // self.rows).logits if self.now else 0

    def bytes(self, rows: int, step: RunStep) -> int | None:
        """Bytes of a step with micro-batches of ``rows`` rows; None if it cannot be traced."""
        try:
            return step.memory(rows, self.share // rows).total
        except TraceError as error:
            self.failed = str(error)
            return None

    def other(self, make: Callable[[], LightningModule], **options: Any) -> RunStep:
        """The step with another module, or with other options of `RunStep`, in the time that is left."""
        return RunStep(self.trainer, make, self._batch, until=self.step.until, **options)

    @cached_property
    def lines(self) -> list[str]:
        """Three settings to lower: those that suffice or may suffice, then others; the one that helps most first."""
        enough: list[str] = []
        too_little: list[str] = []
        for setting in _settings(self.trainer, self.module, self):
            told = setting.text if setting.bytes is None else f"{setting.text}: {gigabytes(setting.bytes)}"
            if setting.bytes is None or self.room is None or setting.bytes <= self.room.bytes:
                enough.append(told)
            else:
                too_little.append(f"{told}, not enough by itself")
            if len(enough) == _LINES:
                break
        last = "the model: a smaller one, or more devices that share it (cli_configs/strategy/fsdp2.yaml)"
        return [f"  {number}. {text}" for number, text in enumerate([*enough, *too_little, last][:_LINES], 1)]

    def words(self) -> list[str]:
        """What the step takes as it is, in a sentence, or why that is not known."""
        if self.now is None or self.room is None:
            return [self.failed] if self.failed else []
        rows = "row" if self.rows == 1 else "rows"
        return [
            f"A traced step with this batch of {self.rows} {rows} takes {gigabytes(self.now)}, and the device has "
            f"{gigabytes(self.room.bytes)} for it."
        ]


@dataclass(frozen=True)
class _Setting:
    """A setting to lower, and the bytes of a step with it; None if they are not known."""

    text: str
    bytes: int | None = None


def _settings(trainer: Trainer, module: LightningModule, traces: _Traces) -> Iterator[_Setting]:
    """Settings to lower, the one that helps most first; a step is traced when its setting is asked for."""
    rows, smaller = _smaller_batch(trainer, traces)
    yield from smaller
    # A data module of the user's may have the setting too.
    length = getattr(getattr(trainer, "datamodule", None), "max_length", None)
    if isinstance(length, int):
        yield _Setting(f"max_length: {length} -> {length // 2} tokens; activations shrink with it, long rows are cut")
    if traces.now and traces.logits > _MANY * traces.now and has_vocabulary(module):
        yield _Setting(
            f"the loss: cross-entropy of whole logits -> lightning_lora.tasks.head_loss, as CausalLM computes it where "
            f"a model returns its head's output; logits and their gradients take {gigabytes(traces.logits)}"
        )
    for text, make, options in _methods(trainer, module):
        few = f" (with batch_size {rows})" if rows < traces.rows else ""
        found = None if traces.now is None else traces.bytes(rows, traces.other(make, **options))
        if found is None or rows < traces.rows or found < (traces.now or 0):
            yield _Setting(text + few, found)


_Method = tuple[str, Callable[[], LightningModule], dict[str, Any]]
"""What it is, the module with it, and options of `RunStep`."""


def _methods(trainer: Trainer, module: LightningModule) -> Iterator[_Method]:
    """Ways to train the same with less memory, the one that helps most first."""
    is_task = module.hparams.get("quantization", "no such setting") is None
    adapted = bool(lora_layers(module))
    if isinstance(module, LoRAMixin) and not adapted:
        make = partial(made_with, module, lora={}) if is_task else partial(with_adapters, module)
        gone = "gradients and optimizer state of the base, 12 bytes a weight, are gone"
        yield f"lora: full fine-tuning -> LoRA; {gone}", make, {}
    if isinstance(module, LoRAMixin) and (now := choices_of(module)) != (least := frugal(now)):
        yield f"step_memory: {now} -> {least}", lambda: module, {"prepare": lambda made: made.use_step_memory(least)}
    narrower = {"32-true": "half of weights and activations", "bf16-mixed": "half of the weights"}
    is_held = getattr(module, "_lora_held", None) is not None
    if trainer.precision in narrower and module.hparams.get("dtype") is None and not is_held:
        text = f"trainer.precision: {trainer.precision} -> bf16-true; {narrower[trainer.precision]}"
        make = partial(made_with, module) if is_task else lambda: module
        yield text, make, {"precision": "bf16-true"}
    able = next((child for child in module.modules() if could_recompute(child)), None)
    if able is not None:
        text = f"activation checkpointing: off -> {recomputing_method(able)}() on the model, in configure_model"
        if "activation_checkpointing" in module.hparams:
            text = "activation_checkpointing: false -> true"
        kept = "activations are computed twice instead of kept"
        yield f"{text}; {kept}", lambda: module, {"prepare": recompute}
    if adapted and is_task and trainer.world_size == 1:
        text = "quantization: none -> nf4; the base takes a quarter of its 16-bit size"
        yield text, partial(made_with, module, quantization="nf4"), {}


def _smaller_batch(trainer: Trainer, traces: _Traces) -> tuple[int, list[_Setting]]:
    """The smaller batch as a setting, and the rows with which other settings are traced: all, if fewer would fit."""
    rows = loader_batch_size(trainer.val_dataloaders if trainer.validating else trainer.train_dataloader)
    if rows is None or rows < 2:
        return traces.rows, []
    steps, found = trainer.accumulate_grad_batches, None
    few = next(fewer for fewer in divisors(rows * steps) if fewer <= rows // 2)
    if traces.now is not None and traces.room is not None and rows == traces.rows:
        few, found = _fitting_rows(traces, traces.room)
    text = (
        f"batch_size: {rows} -> {few}; with trainer.accumulate_grad_batches {steps} -> {rows * steps // few} the "
        f"optimizer step stays as large"
    )
    fits = found is None or traces.room is None or found <= traces.room.bytes
    return traces.rows if fits else few, [_Setting(text, found)]


def _fitting_rows(traces: _Traces, room: Room) -> tuple[int, int | None]:
    """The largest smaller micro-batch that fits by its trace and divides the step, or 1, and the bytes of its step."""
    sizes = [rows for rows in divisors(traces.share) if rows < traces.rows]
    try:
        rows = traces.step.largest_micro_batch(room.bytes, traces.share, sizes) or 1
    except TraceError:
        return next(fewer for fewer in sizes if fewer <= traces.rows // 2), None
    return rows, traces.bytes(rows, traces.step)


def _place(trainer: Trainer, module: LightningModule) -> str:
    stage = "in validation after" if trainer.validating else "in"
    step = trainer.global_step + (0 if trainer.validating else 1)
    if module.device.type != "cuda":
        return f"{stage} optimizer step {step}"
    peak, total = torch.cuda.max_memory_allocated(module.device), torch.cuda.mem_get_info(module.device)[1]
    return f"{stage} optimizer step {step}, at a peak of {peak / 1e9:.1f} of {total / 1e9:.1f} GB"
