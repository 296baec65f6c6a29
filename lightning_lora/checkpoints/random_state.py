"""The state of every random generator of a process, as plain types that load under ``weights_only=True``."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def random_state(device: torch.device, own: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """States of python's, numpy's and torch's global generators, and of the one on ``device`` if that is a GPU.

    Args:
        device: Where the module of this process is.
        own: Further generators, as loaders may have.
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
    """Put back what `random_state` gave; a GPU's state is passed over on a CPU.

    Args:
        state: From `random_state`, of this or another process.
        device: Where the module of this process is.
        own: As many further generators; if the state has not that many they start anew from their seeds.
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
    """Whatever draws random numbers inside has drawn none afterwards; arguments as those of `random_state`."""
    before = random_state(device, own)
    try:
        yield
    finally:
        set_random_state(before, device, own)
