"""Which implementation of attention a model uses, and which one packed rows get.

Packed rows hold several examples, and a token must not see those before its own. FlashAttention is given where examples
begin, flex attention skips blocks of the mask that are empty; the others compute every pair of tokens of a row and need
a mask of ``tokens x tokens`` for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils._triton import has_triton

from lightning_lora.errors import ConfigError, TaskSettingError, check_choice, first_line, kind_and_line
from lightning_lora.memory.run_step import gigabytes

if TYPE_CHECKING:  # the module imports torchao, bitsandbytes and peft
    from transformers import PreTrainedModel

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
DENSE = ("eager", "sdpa")
"""Implementations that compute every pair of tokens of a packed row; a trace knows no others."""
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
_BLOCK = 128
"""Tokens of the trial of flex attention: a block of its mask."""


def check_attention(name: str | None) -> None:
    """Refuse a name that is neither of `ATTENTIONS`, nor registered with transformers, nor of a kernel of the hub.

    Raises:
        ConfigError: If the name is unknown.
    """
    if name is None or name in ATTENTIONS or "/" in name:
        return
    from transformers import AttentionInterface

    if name not in AttentionInterface().valid_keys():
        check_choice("attn_implementation", name, ATTENTIONS, TaskSettingError, optional=True)


def unusable_attention(name: str, error: Exception) -> ConfigError:
    """The error for an implementation that the model or this machine does not have."""
    return TaskSettingError(
        f"attn_implementation={name!r} cannot be used with this model on this machine: {first_line(error)} The choices "
        f"are {', '.join(ATTENTIONS)}, or null for the model's own."
    )


def choose_for_packing(
    model: PreTrainedModel, shape: tuple[int, ...], check: Callable[[], bool], *, is_given: bool, device: str
) -> bool:
    """Choose an implementation for packed rows, and tell what was chosen.

    On a GPU: FlashAttention 2 if it is installed, else flex attention if model and machine can train with it, else what
    the model has. On a CPU the model keeps what it has, since flex attention has no backward pass there. A given
    setting is kept everywhere.

    Args:
        model: The model, whose setting is changed.
        shape: Rows and tokens of the first packed batch, for the message.
        check: `check_packing` of the model as it is set.
        is_given: Whether the user has chosen.
        device: Type of the device the model computes on.

    Returns:
        What ``check`` returned for the implementation that was chosen.
    """
    before, reasons = model.config._attn_implementation or "eager", []
    if device == "cuda" and not is_given and before in DENSE:
        for name in ("flash_attention_2", "flex_attention"):
            reason = _obstacle(model, name, device)
            if not reason:
                try:
                    model.set_attn_implementation(name)
                    separates = check()
                    rank_zero_info(f"packed rows: {name} (attn_implementation: {before} keeps {before})")
                    return separates
                except Exception as error:  # whatever a kernel or a compiler says of this model and machine
                    model.set_attn_implementation(before)
                    reason = kind_and_line(error)
            reasons.append(f"{name}: {reason}")
    separates = check()
    if before in DENSE:
        _tell_of_mask(model, before, shape if separates else (1, shape[0] * shape[1]), reasons, device)
    return separates


def _tell_of_mask(model: PreTrainedModel, name: str, shape: tuple[int, ...], reasons: list[str], device: str) -> None:
    rows, tokens = shape
    # sdpa gets truth values, eager attention numbers to add.
    size = rows * tokens**2 * (1 if name == "sdpa" else model.dtype.itemsize)
    told = (
        f"packed rows: {name} with a mask of {rows} x {tokens:,} x {tokens:,} ({gigabytes(size)}), and attention is "
        "computed between all tokens of a row, its time growing with the square of the row"
    )
    if device != "cuda":
        rank_zero_info(told)
        return
    because = f" ({'; '.join(reasons)})" if reasons else ""
    rank_zero_warn(
        f"{told}. Neither FlashAttention nor flex attention is used{because}: install flash-attn, set "
        "attn_implementation, or make rows shorter."
    )


def _obstacle(model: PreTrainedModel, name: str, device: str) -> str:
    """Why a model cannot train with an implementation here; "" if nothing is known against it."""
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    if name == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            return "flash-attn is not installed"
        return "" if dtype in (torch.float16, torch.bfloat16) else f"it does not compute in {dtype}"
    if not getattr(model, "_supports_flex_attn", True):
        return f"{type(model).__name__} does not support it"
    config = model.config.get_text_config()
    if any(getattr(config, dropout, 0) for dropout in _DROPOUTS):
        return "it has no dropout, and the config of the model sets one for attention"
    if not has_triton():
        return "Triton is not installed"
    try:
        _train_flex(config, dtype, device)
    except Exception as error:  # of the compiler, of a kernel that needs more shared memory than the device has, ...
        return kind_and_line(error)
    return ""


def _train_flex(config: Any, dtype: torch.dtype, device: str) -> None:
    """A forward and a backward pass of flex attention with the heads of a model."""
    from torch.nn.attention.flex_attention import create_block_mask
    from transformers.integrations.flex_attention import flex_attention_forward

    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        query, key, value = (
            torch.zeros(1, count, _BLOCK, width, dtype=dtype, device=device, requires_grad=True)
            for count in (heads, *[getattr(config, "num_key_value_heads", None) or heads] * 2)
        )
        mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, _BLOCK, _BLOCK, device=device)
        output, _ = flex_attention_forward(torch.nn.Identity(), query, key, value, mask)
        torch.autograd.grad(output.sum(), (query, key, value))
