"""Scratch memory is taken once for each use and type."""

from __future__ import annotations

import torch

from lightning_lora.files.scratch import Scratch


def test_memory_is_used_again_for_the_same_use_and_type_alone() -> None:
    scratch = Scratch()
    first = scratch.empty("sum", (4, 5), torch.float32).fill_(1.0)
    others = [scratch.empty("weight", (4, 5), torch.float32), scratch.empty("sum", (4, 5), torch.float64)]
    assert all(other.fill_(2.0).shape == (4, 5) for other in others)
    assert bool((first == 1.0).all())
    assert scratch.empty("sum", (2, 3), torch.float32).data_ptr() == first.data_ptr()


def test_memory_grows_with_what_is_asked_for() -> None:
    scratch = Scratch()
    scratch.empty("sum", (2,), torch.float32)
    assert scratch.empty("sum", (3, 1), torch.float32).shape == (3, 1)
