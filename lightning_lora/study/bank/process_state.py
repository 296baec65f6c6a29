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

    def has_drawn(self) -> bool:
        """Whether one of the generators is in another state by now."""
        numbers: Any = numpy.random.get_state()
        if random.getstate() != self._python or numbers[2:] != self._numpy[2:]:
            return True
        now, now_cuda = _torch_states()
        states = zip([self._torch, *self._cuda], [now, *now_cuda], strict=False)
        return bool((numbers[1] != self._numpy[1]).any()) or any(not torch.equal(*pair) for pair in states)


def seed_all(seed: int) -> None:
    """Seed all global generators; unlike `seed_everything` it leaves nothing in the environment."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _torch_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
