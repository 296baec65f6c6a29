"""Loading a pretrained base in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from transformers import BitsAndBytesConfig

from lightning_lora.errors import ConfigError, did_you_mean

QUANTIZATIONS = ("nf4", "int8")
# transformers loads through both; neither is needed for anything else here.
_LIBRARIES = ("bitsandbytes", "accelerate")


def check_quantization(quantization: str | None, lora: Any, stored: Any) -> None:
    """Refuse a setting that cannot work, before anything is loaded.

    Args:
        quantization: What the user asked for.
        lora: The LoRA settings; None means full fine-tuning.
        stored: The quantisation the model is stored in, from its config; None for a plain model.

    Raises:
        ConfigError: If the setting is unknown, contradicts another one, or needs a library that is not installed.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ConfigError(
            f"quantization must be one of {', '.join(QUANTIZATIONS)} or null, got {quantization!r}"
            f"{did_you_mean(str(quantization), QUANTIZATIONS)}"
        )
    if quantization is not None and stored is not None:
        raise ConfigError(f"quantization is {quantization!r}, but the model is stored quantised: leave it null.")
    if (quantization is not None or stored is not None) and lora is None:
        raise ConfigError(
            f"a quantised base (quantization={quantization or 'as stored'}) cannot be trained in full: give lora "
            f"settings, or set quantization to null."
        )
    missing = [library for library in _LIBRARIES if quantization is not None and find_spec(library) is None]
    if missing:
        raise ConfigError(
            f"quantization={quantization!r} needs {' and '.join(missing)}: pip install lightning-lora[quant]"
        )


def check_strategy(trainer: Trainer | None) -> None:
    """Refuse to load quantised weights for a strategy that would shard them.

    Raises:
        ConfigError: If the strategy shards parameters.
    """
    strategy = getattr(trainer, "strategy", None)
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        raise ConfigError(
            f"{type(strategy).__name__} cannot shard a quantised base: use one device or ddp, or set quantization to "
            f"null."
        )


def quantized_loading(
    quantization: str, dtype: torch.dtype, plain: Iterable[str], trainer: Trainer | None
) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise while loading.

    Args:
        quantization: ``"nf4"`` or ``"int8"``.
        dtype: Type of everything that is not quantised, and of the arithmetic.
        plain: Names of the modules to leave unquantised: heads, and what is trained in full.
        trainer: Says which device to load to; None: the CPU.
    """
    skipped = list(plain)
    if quantization == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    # Left to itself transformers loads to a GPU wherever there is one.
    device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
    return {"quantization_config": config, "device_map": {"": device}}
