"""The state of all random generators of a process, as plain types that load under ``weights_only=True``."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from lightning.pytorch import Trainer

from lightning_lora.checkpoints.loader_position import generators
from lightning_lora.lightning_private import training_loaders


def random_state(device: torch.device, own: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Get the states of the global generators of python, numpy and torch, and of ``device`` if it is a GPU.

    Args:
        own: Further generators, such as those of loaders.
    """
    version, words, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=False)
    state = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "words": torch.from_numpy(legacy["state"]["key"].astype("int64")),
            "place": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "own": [generator.get_state() for generator in own],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device, own: Sequence[torch.Generator] = ()) -> None:
    """Restore what `random_state` returned; the state of a GPU is ignored on a CPU.

    Args:
        own: The same further generators. If ``state`` holds another number of them, all start again from their seeds.
    """
    python, legacy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    words = legacy["words"].cpu().numpy().astype("uint32")
    numpy.random.set_state(("MT19937", words, legacy["place"], legacy["has_gauss"], legacy["gauss"]))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if len(state["own"]) == len(own):
        for generator, saved in zip(own, state["own"], strict=True):
            generator.set_state(saved.cpu())
    else:
        for generator in own:
            generator.manual_seed(generator.initial_seed())


@contextmanager
def kept_random_state(device: torch.device, own: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Restore all random generators at the end of the block; arguments as in `random_state`."""
    before = random_state(device, own)
    try:
        yield
    finally:
        set_random_state(before, device, own)


def run_random_state(trainer: Trainer) -> dict[str, Any]:
    """Get the `random_state` of a run: the generators of its process and those of its training loaders."""
    return random_state(trainer.strategy.root_device, generators(training_loaders(trainer)))


def set_run_random_state(state: dict[str, Any], trainer: Trainer) -> None:
    """Restore what `run_random_state` returned."""
    set_random_state(state, trainer.strategy.root_device, generators(training_loaders(trainer)))
