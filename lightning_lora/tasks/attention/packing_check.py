"""A check that a model keeps packed examples apart, made on its logits and not on its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.errors import TaskSettingError, first_line
from lightning_lora.lora.evaluation_mode import in_eval_mode, uncompiled
from lightning_lora.lora.functional.torch_internals import has_values

EXAMPLE_TOKENS = 8
"""Tokens in each of the two test examples: more than the usual convolution spans, few enough for any model."""
NOISE_FACTOR = 10.0
"""Largest accepted ratio of the change of the second example's logits to the change of the first's."""


def check_packing(model: nn.Module, logits: Callable[..., Tensor], vocab_size: int) -> bool:
    """Check that packing examples does not change their logits.

    Two examples are run as separate rows and packed into one row. Nothing stands before the first example, so the
    change of its logits is rounding error. The second example passes if its logits change by at most ten times as
    much, or by four units of rounding; neither may change by more than sixteen units (in bfloat16, 3 % and 13 % of the
    norm of a token's logits). All ranks run the same tokens and so reach the same result.

    Args:
        model: The model that ``logits`` runs. It is put in eval mode for the check, as dropout would hide a leak.
        logits: Computes logits from ``input_ids`` and either ``attention_mask`` or ``position_ids``.
        vocab_size: Number of token ids the model knows; the check uses ids below it.

    Returns:
        True if packed examples are kept apart in a batch of several rows. False if only in a batch of one row:
        FlashAttention in transformers looks for examples in a single row, into which a batch can be reshaped.

    Raises:
        ConfigError: If the logits change in a batch of one row too, or the model takes no ``position_ids``.
    """
    if not has_values(next(model.parameters())):
        return True  # a trace has no logits to compare
    with _eval_without_trace(model):
        if _find_fault(model, logits, vocab_size, num_rows=2) is None:
            return True
        fault = _find_fault(model, logits, vocab_size, num_rows=1)
    if fault is None:
        return False
    raise TaskSettingError(
        f"{_class_name(model)} does not keep packed examples apart: {fault}. Recurrence or convolution over tokens, "
        "ALiBi, or a mask or positions that are not made from position_ids let one example see another or count on. "
        "Turn packing off (packing=False of SFTDataModule)."
    )


def _find_fault(model: nn.Module, logits: Callable[..., Tensor], vocab_size: int, num_rows: int) -> str | None:
    """What goes wrong with packing in a batch of ``num_rows`` rows; None if nothing does."""
    device = next(model.parameters()).device
    step = max(vocab_size // (2 * EXAMPLE_TOKENS + 1), 1)
    tokens = (torch.arange(1, 2 * EXAMPLE_TOKENS + 1, device=device) * step % vocab_size).view(2, EXAMPLE_TOKENS)
    positions = torch.arange(EXAMPLE_TOKENS, device=device).repeat(num_rows, 2)
    scores = logits(tokens, attention_mask=torch.ones_like(tokens))
    alone = _centred(scores)
    try:
        packed = logits(tokens.view(1, -1).expand(num_rows, -1), position_ids=positions)
    except (TypeError, ValueError) as error:
        return f"it does not take position_ids ({first_line(error)})"
    changes = (_centred(packed).view(num_rows, *alone.shape) - alone).norm(dim=-1) / alone.norm(dim=-1)
    first, second = changes[:, 0].max().item(), changes[:, 1].max().item()
    unit = _rounding_unit(model, scores)
    floor, ceiling = max(4 * unit, 1e-5), max(16 * unit, 1e-3)
    # Not "second > allowed": NaN must not pass.
    if second <= min(max(NOISE_FACTOR * first, floor), ceiling) and first <= ceiling:
        return None
    return f"in one row, the logits of two examples change by {first:.1e} and {second:.1e} of their size"


def _centred(logits: Tensor) -> Tensor:
    """Logits minus their mean over the vocabulary, on which no probability depends."""
    logits = logits.double()
    return logits - logits.mean(-1, keepdim=True)


def _rounding_unit(model: nn.Module, logits: Tensor) -> float:
    """The coarsest relative rounding among the types that the logits were computed in."""
    dtypes = {logits.dtype} | {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    device = logits.device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    # Types of one byte store quantised weights; nothing is computed in them.
    units = [torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize > 1]
    # TF32 rounds the factors of float32 products to 10 bits. torch.get_float32_matmul_precision() raises RuntimeError
    # once the setting was made by this attribute, which also shows what the older functions have set.
    if device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        units.append(2.0**-10)
    return max(units)


@contextmanager
def _eval_without_trace(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients; restore the mode of every module and the random generators on exit."""
    with uncompiled(), in_eval_mode(model), torch.no_grad(), kept_random_state(next(model.parameters()).device):
        yield


def _class_name(model: nn.Module) -> str:
    # FSDP2 replaces the class of a sharded module by a subclass with this prefix.
    return type(model).__name__.removeprefix("FSDP")
