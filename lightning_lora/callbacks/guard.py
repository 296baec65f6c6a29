"""Proof of life: what is trained takes effect, and what is frozen stays as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.adapter import FACTORS, check_not_merged, lora_layers
from lightning_lora.errors import GuardError, first_five
from lightning_lora.fingerprint import base_digests, tensor_digest
from lightning_lora.layers.base import LoRALayer
from lightning_lora.optim import check_optimizers


class LoRAGuard(Callback):
    """Stops a run in which an adapter would silently do nothing, and shows at the end that the base is untouched.

    Checked: every adapter is in exactly one optimizer; its update is computed in the first training batch and in the
    first evaluation batch (torch's fast paths skip it); it gets a gradient within ``patience`` optimizer steps; it has
    moved by the end; base weights are bit for bit what they were (up to 65,536 sampled values a tensor), and buffers
    too, or a warning names them. Without LoRA in the module the guard does nothing.

    Args:
        patience: Optimizer steps within which every adapter must have had a non-zero gradient.

    Raises:
        GuardError: Naming the layers concerned.
    """

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self._calls: _Calls | None = None
        self._checked: set[str] = set()
        self._without_gradient: set[str] = set()
        self._base: dict[str, str] = {}
        self._buffers: dict[str, str] = {}
        self._steps = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the base."""
        self._checked, self._steps = set(), 0
        self._base = base_digests(pl_module, _trained(pl_module), exact=True) if lora_layers(pl_module) else {}
        self._buffers = _buffer_digests(pl_module) if self._base else {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that every adapter will be trained."""
        layers = lora_layers(pl_module)
        if layers:
            check_optimizers(pl_module, trainer.optimizers)
            check_not_merged(pl_module, "train")
        self._without_gradient = set(layers)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch which adapters run in the first training batch."""
        self._watch("training", pl_module)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which adapters have had a gradient."""
        if self._without_gradient:
            layers = lora_layers(pl_module)
            self._without_gradient = {name for name in self._without_gradient if not _has_gradient(layers[name])}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report adapters that did not run, or have gone without a gradient for too long."""
        self._report("training")
        if self._without_gradient and trainer.global_step >= self._steps + self.patience:
            names, self._without_gradient = sorted(self._without_gradient), set()
            raise GuardError(
                f"{len(names)} adapters got no gradient in {self.patience} optimizer steps: {first_five(names)}. Their "
                f"layers do not reach the loss, or activation checkpointing is reentrant with frozen inputs "
                f"(use_reentrant=False)."
            )

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch which adapters run in the first evaluation batch."""
        self._watch("evaluation", pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Report adapters that did not run."""
        self._report("evaluation")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the layers as they were found."""
        self._stop_watching()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that every adapter has moved and the base has not."""
        layers = lora_layers(pl_module)
        if not self._base or not trainer.global_step:
            return
        still = [name for name, layer in layers.items() if not layer.lora_moved]
        if still:
            raise GuardError(f"{len(still)} of {len(layers)} adapters did not move in training: {first_five(still)}.")
        changed = _changed(self._base, base_digests(pl_module, _trained(pl_module), exact=True))
        if changed:
            raise GuardError(f"{len(changed)} frozen base weights were changed by training: {first_five(changed)}.")
        buffers = _changed(self._buffers, _buffer_digests(pl_module))
        if buffers:
            warnings.warn(
                f"training changed {len(buffers)} buffers of the base: {first_five(buffers)}. An adapter alone does "
                f"not carry them; put those layers in eval mode to keep them.",
                stacklevel=2,
            )

    def _watch(self, mode: str, module: nn.Module) -> None:
        layers = lora_layers(module)
        if mode not in self._checked and self._calls is None and layers:
            self._calls = _Calls(layers)

    def _report(self, mode: str) -> None:
        silent = self._stop_watching()
        if mode in self._checked or silent is None:
            return
        self._checked.add(mode)
        if silent:
            raise GuardError(
                f"{len(silent)} adapters took no part in {mode}: {first_five(silent)}. Something computes with their "
                f"weights without calling them (a fused path, F.linear(x, layer.weight)); exclude them, or make the "
                f"module call them."
            )

    def _stop_watching(self) -> list[str] | None:
        calls, self._calls = self._calls, None
        return None if calls is None else calls.stop()


class _Calls:
    """Records which layers are called, by shadowing their ``forward``: hooks would switch torch's fast paths off."""

    def __init__(self, layers: Mapping[str, LoRALayer]) -> None:
        self.layers = layers
        self.called: set[str] = set()
        for name, layer in layers.items():
            layer.__dict__["forward"] = self._recording(name, layer.forward)

    def _recording(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            self.called.add(name)
            return forward(*args, **kwargs)

        return record

    def stop(self) -> list[str]:
        """Take the records off and name the layers that were not called."""
        for layer in self.layers.values():
            layer.__dict__.pop("forward", None)
        return [name for name in self.layers if name not in self.called]


def _has_gradient(layer: LoRALayer) -> bool:
    gradients = [getattr(layer, factor).grad for factor in FACTORS]
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def _buffer_digests(module: nn.Module) -> dict[str, str]:
    return {name: tensor_digest(buffer, exact=True) for name, buffer in module.named_buffers() if _holds_values(buffer)}


def _holds_values(buffer: Tensor) -> bool:
    return buffer.device.type != "meta" and buffer.layout is torch.strided


def _changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return [name for name, digest in before.items() if after.get(name) != digest]
