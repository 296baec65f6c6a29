"""One training step of a LightningModule, traced: its memory at the peak and its floating-point operations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

from lightning_lora.batch.token_loss import TokenWeightedLoss
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.lora.layers.quantised_weights import is_quantised, stored_parts
from lightning_lora.memory.building import WithoutMemory
from lightning_lora.memory.depths import DEPTHS, Traced, at_depth
from lightning_lora.memory.equal_blocks import equal_blocks
from lightning_lora.memory.failures import TraceError
from lightning_lora.memory.parts import MemoryParts
from lightning_lora.memory.step_mode import known_batch


@dataclass(frozen=True)
class StepTrace:
    """What a training step takes on one device.

    Args:
        memory: Bytes at the peak, by what they are for.
        flops: Floating-point operations of forward and backward of one micro-batch.
        largest_layer: Bytes of the weights of the largest block, which FSDP holds whole when it computes.
        depths: The numbers of equal blocks that were traced, where the model has more and the rest was found along a
            line; empty if the whole model was traced.
        attention_flops: The part of ``flops`` that grows with the square of a row's length.
    """

    memory: MemoryParts
    flops: int
    largest_layer: int = 0
    depths: tuple[int, ...] = ()
    attention_flops: int = 0


def trace_step(
    module: LightningModule,
    batch: Any,
    *,
    precision: Any = "32-true",
    gradient_clip_val: float | None = None,
    accumulate_grad_batches: int = 1,
    whole: bool = False,
) -> StepTrace:
    """Trace a training step of ``module`` without values and without memory for weights or activations.

    The second of two optimizer steps is counted, as Lightning runs it: forward, gradients set to None, backward,
    clipping, optimizer, which has its state by then. The batch keeps its values, so that labels, masks and
    lengths count as they are; numbers that depend on weights are made up (`lightning_lora.memory.step_mode`).

    Of a stack of many equal blocks, such as the layers of a transformer, a few are traced (`lightning_lora.memory.
    depths`), at three depths that must be on a line; else the whole model is traced.

    Args:
        module: Any LightningModule with automatic optimization; it is left as it is. Its weights need not be loaded.
        batch: One micro-batch as the training loader makes it.
        precision: The precision of the Trainer.
        gradient_clip_val: Largest norm of the gradient, a setting of the Trainer; None does not clip.
        accumulate_grad_batches: Micro-batches of an optimizer step.
        whole: Trace every block, which takes longer.

    Raises:
        TraceError: If the step cannot run without values, such as a custom operation without a fake kernel.

    Returns:
        Memory of one device that holds the whole model, without overhead; `lightning_lora.memory.strategies` divides
        it. And the floating-point operations.
    """
    return StepTracer(module, precision, gradient_clip_val, accumulate_grad_batches).trace(batch, whole=whole)


class StepTracer:
    """Traces steps of one module with several batches; the module is built once."""

    def __init__(
        self,
        module: LightningModule,
        precision: Any = "32-true",
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
    ) -> None:
        self._built = WithoutMemory(module, precision, accumulate_grad_batches)
        self.clip, self._equal = gradient_clip_val, equal_blocks(self.module)
        self.module.log = _no_log  # type: ignore[method-assign]
        self._layer = _largest_layer(self.module)
        self._seen = 0.0  # equal blocks that have run
        with self._built.entered():
            self._take_stock()

    @property
    def module(self) -> LightningModule:
        """The module as it is traced: built and adapted, without values. Its shapes and types may be read."""
        return self._built.module

    def trace(self, batch: Any, whole: bool = False) -> StepTrace:
        """Trace a step with this batch, as `trace_step` does."""
        with self._built.entered():
            if self._equal is not None and not whole:
                # The deepest first: what it finds out in its first pass holds for the others.
                traced = {depth: self._at(depth, batch) for depth in sorted(DEPTHS, reverse=True)}
                found = at_depth(traced, len(self._equal.blocks))
                if found is not None:
                    return self._found(found, DEPTHS)
            found = self._traced(batch)
            return self._found(found, ())

    def _found(self, found: Traced, depths: tuple[int, ...]) -> StepTrace:
        return StepTrace(MemoryParts(**found.peak), found.flops, self._layer, depths, found.attention_flops)

    def _at(self, depth: int, batch: Any) -> Traced:
        assert self._equal is not None
        with self._equal.shortened(depth), self._equal.marked(depth, self._built.mode.live):
            return self._traced(batch, depth)

    def _traced(self, batch: Any, depth: float = math.inf) -> Traced:
        if not self.module.automatic_optimization:
            raise TraceError(
                f"{type(self.module).__name__} optimizes by itself (automatic_optimization = False), so its steps are "
                f"not known before they run: its memory is measured in a run with MemoryAdvice only."
            )
        try:
            with self._built.explained("a training step"):
                steps = _Steps(self._built, batch, self.clip)
                if depth > self._seen:
                    steps.look_around()
                    self._seen = depth
                return steps.traced()
        finally:
            for parameter in self.module.parameters():
                parameter.grad = None
            self._built.trainer.strategy.optimizers = []

    def _take_stock(self) -> None:
        """Count what the module holds, copies of the base's values included, and watch its gradients."""
        live = self._built.mode.live
        self._built.mode.class_counts = set(_class_counts(self.module))
        live.move_all("weights")
        live.move(weight_tensors(self.module), "weights")
        live.move(factor_parameters(self.module).values(), "adapters")
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: live.move([p.grad], "gradients"))


class _Steps:
    """Two optimizer steps with one batch."""

    def __init__(self, built: WithoutMemory, batch: Any, clip: float | None) -> None:
        self.module, self.mode, self.trainer, self.clip = built.module, built.mode, built.trainer, clip
        self.batch = self._batch(batch)
        self.optimizers = self._optimizers()
        self.flops = self.attention_flops = 0

    def traced(self) -> Traced:
        """The second step.

        It differs from the first in two things: the optimizer has its state, and the gradients of the step before are
        there until they are set to None. So forward and backward run once, and both are added where they are alive.
        """
        live = self.mode.live
        live.start_again()
        self._micro_batches()
        gradients = live.held["gradients"]
        self._finish_gradients()
        peaks = live.peaks
        live.start_again()
        self._optimize()
        live.move(_state_tensors(self.optimizers), "optimizer")
        live.start_again()
        self._optimize()
        for segment, parts in peaks.items():
            parts["optimizer"] += live.held["optimizer"]
            parts["gradients"] += gradients if segment[0] == "forward 0" else 0
        return Traced({**peaks, **live.peaks}, self.flops, self.attention_flops)

    def look_around(self) -> None:
        """Run a forward pass that does not count, for what a module makes or finds out in its first."""
        loss = self._loss(0)
        if isinstance(self.module, TokenWeightedLoss) and loss is not None:
            self.module.mean_of_micro_batch(loss)  # and its tokens are forgotten

    def _micro_batches(self) -> None:
        """Forward and backward of the micro-batches of a step."""
        micro_batches = min(2, self.trainer.accumulate_grad_batches)
        for number in range(micro_batches):
            before = self.mode.flops, self.mode.attention_flops
            self.mode.live.begin((f"forward {number}",))
            loss = self._loss(number)
            if number == 0:
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
            self.mode.live.begin((f"backward {number}",))
            if loss is not None:
                self.module.backward(loss / self.trainer.accumulate_grad_batches)
            del loss
            self.flops = self.mode.flops - before[0]
            self.attention_flops = self.mode.attention_flops - before[1]

    def _finish_gradients(self) -> None:
        self.mode.live.begin(("clipping",))
        for optimizer in self.optimizers:
            self.module.on_before_optimizer_step(optimizer)
            self._clip(optimizer)

    def _optimize(self) -> None:
        self.mode.live.begin(("optimizer",))
        for optimizer in self.optimizers:
            optimizer.step()

    def _loss(self, number: int) -> Any:
        arguments = self.batch, number
        count = self.module.training_step.__code__.co_argcount - 1
        with self.trainer.precision_plugin.train_step_context():
            output = self.module.training_step(*arguments[:count])
        return output["loss"] if isinstance(output, Mapping) else output

    def _clip(self, optimizer: Optimizer) -> None:
        if self.clip:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)

    def _batch(self, batch: Any) -> Any:
        with unset_fake_temporarily():
            kept = known_batch(batch)
        kept = self.trainer.precision_plugin.convert_input(kept)
        for tensor in tree_flatten(kept)[0]:
            if isinstance(tensor, Tensor):
                self.mode.live.add(tensor, "activations")
        return kept

    def _optimizers(self) -> list[Optimizer]:
        optimizers, _ = _init_optimizers_and_lr_schedulers(self.module)
        self.trainer.strategy.optimizers = optimizers
        return [getattr(optimizer, "_optimizer", optimizer) for optimizer in optimizers]


def weight_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module, those of quantised weights by their parts."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield from stored_parts(tensor) if is_quantised(tensor) else (tensor,)


def _largest_layer(module: nn.Module) -> int:
    """Bytes of the largest item of a list of blocks, or of the largest layer where there is no such list."""
    blocks = [block for child in module.modules() if isinstance(child, nn.ModuleList) for block in child]
    layers = blocks or [child for child in module.modules() if child._parameters]
    return max((sum(tensor.nbytes for tensor in weight_tensors(layer)) for layer in layers), default=0)


def _state_tensors(optimizers: list[Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        yield from (item for item in tree_flatten(list(optimizer.state.values()))[0] if isinstance(item, Tensor))


def _class_counts(module: nn.Module) -> Iterator[int]:
    """Sizes of the vocabulary or the classes: of the model's head, or else of the last linear layer."""
    heads = [head for child in module.modules() if (head := getattr(child, "get_output_embeddings", lambda: None)())]
    linear = [child for child in module.modules() if isinstance(child, nn.Linear)]
    for head in heads or linear[-1:]:
        yield head.out_features


def _no_log(*_: Any, **__: Any) -> None:
    """Takes the place of ``LightningModule.log``."""
