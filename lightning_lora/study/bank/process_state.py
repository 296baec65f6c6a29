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
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
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


def seed_all(seed: int) -> None:
    """Seed all global generators; unlike `seed_everything` it leaves nothing in the environment."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def drawn_since(before: torch.Tensor, before_cuda: list[torch.Tensor]) -> bool:
    """Whether torch's generators are no longer in the states that `generator_states` returned."""
    now, now_cuda = generator_states()
    return not torch.equal(before, now) or any(map(lambda one, two: not torch.equal(one, two), before_cuda, now_cuda))


def generator_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The states of torch's generators."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
