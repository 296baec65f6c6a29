"""What is one for a whole process and must be one for each arm: random numbers, and torch's default type."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


class ProcessState:
    """The state of all global random generators, and the default type of tensors, as they are now."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = numpy.random.get_state()
        self._torch, self._cuda = _torch_states()
        # A Trainer in half precision changes it around each step.
        self._dtype = torch.get_default_dtype()

    def restore(self) -> None:
        """Set what this object remembers."""
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        torch.set_default_dtype(self._dtype)

    def torch_has_drawn(self) -> bool:
        """Whether torch's generators are in another state by now."""
        now, now_cuda = _torch_states()
        return not torch.equal(self._torch, now) or any(
            not torch.equal(one, other) for one, other in zip(self._cuda, now_cuda, strict=False)
        )


def seed_all(seed: int) -> None:
    """Seed all global generators; unlike `seed_everything` it leaves nothing in the environment."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _torch_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
