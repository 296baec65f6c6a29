"""What transformers asks the device about the mask of each batch, answered by the host where it knows the batch.

Before its first layer a model looks whether a mask hides anything, and whether rows hold several examples: the host
waits for the device in the middle of a step. Rows that are padded on the right need no mask where no token sees a later
one, and `BatchFacts` tell whether rows are packed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.lora.evaluation_mode import in_eval_mode, uncompiled
from lightning_lora.lora.functional.torch_internals import has_values

_NUM_TOKENS = 8
_QUESTION = "find_packed_sequence_indices"


def is_causal(model: nn.Module, logits: Callable[[Tensor], Tensor], vocab_size: int) -> bool:
    """Whether another last token changes no logit before it, to the bit. False also where nothing can be compared.

    Args:
        model: The model that ``logits`` runs.
        logits: Computes logits of ``input_ids`` without a mask.
        vocab_size: Number of token ids the model knows.
    """
    weight = next(model.parameters())
    if not has_values(weight):
        return False
    tokens = (torch.arange(1, _NUM_TOKENS + 1, device=weight.device) % vocab_size)[None]
    other = torch.cat([tokens[:, :-1], tokens[:, :1]], 1)
    with uncompiled(), in_eval_mode(model), torch.no_grad(), kept_random_state(weight.device):
        return torch.equal(logits(tokens)[:, :-1], logits(other)[:, :-1])


@contextmanager
def known_packing(packed: bool) -> Iterator[None]:
    """Within the context, transformers does not look whether rows are packed, if its version can be told.

    Args:
        packed: Whether a row may hold several examples, each of which begins where positions do not rise by 1.
    """
    masks = sys.modules.get("transformers.masking_utils")  # a model that is loaded has imported it if it asks
    asks = getattr(masks, _QUESTION, None)
    if masks is None or asks is None:
        yield
        return
    setattr(masks, _QUESTION, _examples if packed else _none)
    try:
        yield
    finally:
        setattr(masks, _QUESTION, asks)


def _examples(position_ids: Tensor) -> Tensor:
    """The number of the example of each token in its row."""
    return (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)


def _none(position_ids: Tensor) -> None:
    """No row holds several examples."""
