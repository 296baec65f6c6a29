"""Loading a pretrained base in 4 or 8 bits."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import BitsAndBytesConfig

from lightning_lora.errors import QuantisationError, check_choice
from lightning_lora.lora.layers.quantised_weights import is_bitsandbytes
from lightning_lora.lora.patterns import matches_any
from lightning_lora.mixin.precision import bitsandbytes_plugin
from lightning_lora.tasks.loading import head_names

QUANTIZATIONS = ("nf4", "int8")
# transformers needs both to quantise while loading; nothing else here uses them.
_LIBRARIES = ("bitsandbytes", "accelerate")


def check_quantization(quantization: str | None, lora: Any, stored: Any) -> None:
    """Refuse settings that cannot work together, before anything is loaded.

    Args:
        quantization: The setting of the task.
        lora: The LoRA settings; None means full fine-tuning.
        stored: The ``quantization_config`` in the model's config; None for a model with plain weights.

    Raises:
        ConfigError: If the value is unknown, contradicts another setting, or needs a library that is not installed.
    """
    check_choice("quantization", quantization, QUANTIZATIONS, QuantisationError, optional=True)
    if quantization is not None and stored is not None:
        raise QuantisationError(f"quantization is {quantization!r}, but the model is stored quantised: leave it null.")
    if (quantization is not None or stored is not None) and lora is None:
        raise QuantisationError(
            f"a quantised base (quantization={quantization or 'as stored'}) cannot be trained in full: give lora "
            f"settings, or set quantization to null."
        )
    missing = [library for library in _LIBRARIES if quantization is not None and find_spec(library) is None]
    if missing:
        raise QuantisationError(
            f"quantization={quantization!r} needs {' and '.join(missing)}: pip install lightning-lora[quant]"
        )


def refuse_plugin(module: LightningModule) -> None:
    """Raise `ConfigError` if Lightning's plugin would quantise the layers of a task."""
    if bitsandbytes_plugin(module) is not None:
        raise QuantisationError(
            f"BitsandbytesPrecision quantises layers as they are built, and transformers then loads plain weights into "
            f"them: drop the plugin and give {type(module).__name__} quantization='nf4' or 'int8'."
        )


def not_quantised(model: nn.Module, trained: Sequence[str]) -> list[str]:
    """Names of the modules of ``model`` that keep plain weights: its heads, and what the patterns ``trained`` name."""
    heads = head_names(model)
    return [name for name, _ in model.named_modules() if name in heads or matches_any(name, trained)]


def check_strategy(trainer: Trainer | None) -> None:
    """Refuse a strategy that would shard quantised weights.

    Raises:
        ConfigError: If the strategy shards parameters.
    """
    strategy = getattr(trainer, "strategy", None)
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        raise QuantisationError(
            f"{type(strategy).__name__} cannot shard a quantised base: use one device or ddp, or set quantization to "
            f"null."
        )


def loading_arguments(
    quantization: str, dtype: torch.dtype, plain: list[str], trainer: Trainer | None
) -> dict[str, Any]:
    """Build the arguments with which ``from_pretrained`` quantises the weights while loading them.

    Args:
        quantization: ``"nf4"`` or ``"int8"``.
        dtype: Type of all weights that are not quantised, and of the arithmetic.
        plain: Names of the modules to leave unquantised: heads, and modules trained in full.
        trainer: The Trainer to whose device the model is loaded; None loads to the CPU.
    """
    if quantization == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=plain,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=plain)
    # Without a device map, transformers loads to a GPU if there is one.
    device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
    return {"quantization_config": config, "device_map": {"": device}}


def quantise_without_values(model: Any, config: BitsAndBytesConfig) -> Any:
    """Replace the layers of a model without values as transformers does while loading, for a trace.

    Args:
        model: A model whose weights are fake tensors.
        config: The configuration from `loading_arguments`.
    """
    with _compiled_when_called():
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    weights = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    biases = {name: model.get_submodule(name).bias for name in weights}
    with unset_fake_temporarily():
        replace_with_bnb_linear(model, config.llm_int8_skip_modules, config)
    made: dict[Any, Any] = {}
    for name in list(weights):
        # Taken out, for a log record of the first use of bitsandbytes may keep this frame.
        layer, weight = model.get_submodule(name), weights.pop(name)
        if is_bitsandbytes(layer):
            stored = _in_8_bits(weight) if config.load_in_8bit else _in_4_bits(weight, made)
            layer._parameters.update(weight=stored, bias=biases[name])
    return model


@contextmanager
def _compiled_when_called() -> Iterator[None]:
    """Within the context ``torch.compile`` does its work when the function is called for the first time.

    bitsandbytes decorates some functions when it is imported, and each would import the compiler, which takes seconds.
    """
    at_once = torch.compile

    def later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(later, **options)
        compiled = functools.cache(lambda: at_once(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = at_once


def _in_4_bits(weight: Tensor, made: dict[Any, Any]) -> Tensor:
    """Quantise a weight, once for each shape and type in ``made``: it has no values, and there may be hundreds."""
    from bitsandbytes.functional import quantize_4bit

    key = weight.shape, weight.dtype
    if key not in made:
        made[key] = quantize_4bit(weight.detach(), blocksize=64, quant_type="nf4")
    stored, state = made[key]
    stored, state = torch.empty_like(stored), copy.copy(state)
    state.absmax = torch.empty_like(state.absmax)
    return _as_parameter(stored, quant_state=state, quant_type="nf4", blocksize=64, bnb_quantized=True)


def _in_8_bits(weight: Tensor) -> Tensor:
    codes = torch.empty_like(weight, dtype=torch.int8, requires_grad=False)
    scales = torch.empty(len(weight), dtype=torch.float32)
    return _as_parameter(codes, CB=codes, SCB=scales, has_fp16_weights=False)


def _as_parameter(stored: Any, **attributes: Any) -> Tensor:
    """A tensor without values that counts as a parameter and has the attributes of bitsandbytes' own class."""
    stored._is_param = True
    for name, value in attributes.items():
        setattr(stored, name, value)
    return stored
