"""Whether a model keeps packed examples apart: asked of its logits, not of its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError

EXAMPLE_TOKENS = 8
"""Tokens in each of the two probed examples: more than the usual convolution spans, few enough for any model."""
NOISE_FACTOR = 10.0
"""How much more than the first example the second may change by."""


def check_packing(model: nn.Module, logits: Callable[..., Tensor], vocab_size: int) -> bool:
    """Whether examples packed in several rows are what they are alone; false if they are in a batch of one row only.

    FlashAttention in transformers looks for examples in a single row; the rows of a batch can then be laid in one.

    Two examples are run as rows of their own and packed into one. What rounding does to logits is read off the first
    example, which has nothing before it: the second may differ from itself alone by at most ten times as much, or by
    four units in the last place, and neither by more than sixteen (in bfloat16 3% and 13% of the size of a token's
    logits). All ranks run the same tokens and so decide the same.

    Args:
        model: What ``logits`` runs; in eval mode meanwhile, so that dropout does not hide a leak.
        logits: From ``input_ids`` and either ``attention_mask`` or ``position_ids`` to logits.
        vocab_size: Ids of the probe are below.

    Raises:
        ConfigError: If the logits differ even in one row, or the model takes no ``position_ids``.
    """
    with _undisturbed(model):
        if _fault(model, logits, vocab_size, num_rows=2) is None:
            return True
        fault = _fault(model, logits, vocab_size, num_rows=1)
    if fault is None:
        return False
    raise ConfigError(
        f"{_class_name(model)} does not keep packed examples apart: {fault}. Recurrence or convolution over tokens, "
        "ALiBi, or a mask or positions that are not made from position_ids let one example see another or count on. "
        "Turn packing off (packing=False of SFTDataModule)."
    )


def _fault(model: nn.Module, logits: Callable[..., Tensor], vocab_size: int, num_rows: int) -> str | None:
    """What is wrong with packing, ``None`` if nothing is."""
    device = next(model.parameters()).device
    step = max(vocab_size // (2 * EXAMPLE_TOKENS + 1), 1)
    tokens = (torch.arange(1, 2 * EXAMPLE_TOKENS + 1, device=device) * step % vocab_size).view(2, EXAMPLE_TOKENS)
    positions = torch.arange(EXAMPLE_TOKENS, device=device).repeat(num_rows, 2)
    scores = logits(tokens, attention_mask=torch.ones_like(tokens))
    alone = _centred(scores)
    try:
        packed = logits(tokens.view(1, -1).expand(num_rows, -1), position_ids=positions)
    except (TypeError, ValueError) as error:
        return f"it does not take position_ids ({str(error).strip().splitlines()[0]})"
    changes = (_centred(packed).view(num_rows, *alone.shape) - alone).norm(dim=-1) / alone.norm(dim=-1)
    first, second = changes[:, 0].max().item(), changes[:, 1].max().item()
    unit = _unit(model, scores)
    floor, ceiling = max(4 * unit, 1e-5), max(16 * unit, 1e-3)
    # Not "second > allowed": NaN must not pass.
    if second <= min(max(NOISE_FACTOR * first, floor), ceiling) and first <= ceiling:
        return None
    return f"in one row, the logits of two examples change by {first:.1e} and {second:.1e} of their size"


def _centred(logits: Tensor) -> Tensor:
    """Logits without what is common to all classes of a token, which no probability depends on."""
    logits = logits.double()
    return logits - logits.mean(-1, keepdim=True)


def _unit(model: nn.Module, logits: Tensor) -> float:
    """The coarsest unit in the last place of what the logits were computed in."""
    dtypes = {logits.dtype} | {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    device = logits.device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    # Storage of quantised weights is no type of arithmetic.
    units = [torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize > 1]
    if device == "cuda":
        # What float32 products are rounded to: TF32 has 10 bits, bfloat16 7.
        units.append({"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()])
    return max(units)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; modes and random numbers as they were afterwards."""
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _class_name(model: nn.Module) -> str:
    # FSDP2 swaps the class of what it shards for a subclass with its own prefix.
    return type(model).__name__.removeprefix("FSDP")
