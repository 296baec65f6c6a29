"""The memory that a kernel may touch: every address that it reads or writes is looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import TensorHandle


class Memory:
    """Tensors that kernels may read and write; everything else is out of bounds."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.touched = 0

    def allow(self, *tensors: Tensor | None) -> None:
        """Let kernels touch these tensors."""
        for tensor in tensors:
            if tensor is not None:
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                self.spans.append((tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size()))

    def uninitialised(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """As `torch_internals.uninitialised`: a tensor to be written, NaN until then."""
        made = like.new_full(tuple(shape), torch.nan, dtype=dtype)
        self.allow(made)
        return made

    def check(self, pointers: Any, mask: Any) -> None:
        """Every address is that of a value of a known tensor."""
        addresses = np.asarray(pointers.data)[np.asarray(mask.data)]
        known = np.zeros(addresses.shape, bool)
        for first, last in self.spans:
            known |= (first <= addresses) & (addresses <= last)
        assert known.all(), f"{(~known).sum()} of {len(addresses)} addresses are out of bounds"
        self.touched += len(addresses)

    def load(self, builder: Any, as_it_is: Any, pointers: Any, mask: Any, other: Any, *how: Any) -> Any:
        """What is masked is NaN where the kernel says nothing else: on a GPU it is undefined."""
        self.check(pointers, mask)
        loaded = as_it_is(builder, pointers, mask, other, *how)
        if other is None and loaded.dtype.scalar.is_floating():
            bits = loaded.data.view(f"u{loaded.data.itemsize}").copy()
            bits[~np.broadcast_to(mask.data, bits.shape)] = np.iinfo(bits.dtype).max
            return TensorHandle(bits.view(loaded.data.dtype), loaded.dtype)
        return loaded

    def store(self, builder: Any, as_it_is: Any, pointers: Any, value: Any, mask: Any, *how: Any) -> Any:
        """Only what may be touched is written."""
        self.check(pointers, mask)
        return as_it_is(builder, pointers, value, mask, *how)
