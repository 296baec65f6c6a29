"""A first look at many tensors for a value that is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm

from .agreement import largest_of_ranks


def may_be_infinite(trainer: Trainer, tensors: Sequence[Tensor]) -> bool:
    """Whether any rank's tensors may hold NaN or infinity; a collective. Look at each then: a norm alone may overflow.

    Args:
        trainer: Of the run.
        tensors: This rank's parts, of which some ranks may hold none.
    """
    # The 2-norm is the fastest sum over everything that keeps NaN and infinity, and one number to wait for.
    is_wrong = ~get_total_norm(list(tensors)).isfinite() if tensors else torch.tensor(False)
    return bool(largest_of_ranks(trainer, is_wrong.int()))
