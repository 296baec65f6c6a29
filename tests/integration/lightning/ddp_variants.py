"""Each kind of DDP that is launched by itself, as one of two processes: ``python ddp_variants.py FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_lora import lora_state_dict
from tests.integration.lightning import adapted_runs

KINDS: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "unused": lambda: "ddp_find_unused_parameters_true",
    "used": lambda: "ddp_find_unused_parameters_false",
    "static graph": lambda: DDPStrategy(static_graph=True),
    "views": lambda: DDPStrategy(gradient_as_bucket_view=True),
}


def main(folder: Path) -> None:
    """Write the adapters of each run for the rank."""
    found = {}
    for kind, make in KINDS.items():
        for way in adapted_runs.WAYS:
            torch.manual_seed(0)
            trainer = adapted_runs.fit(way, folder, strategy=make(), devices=2)
            found[kind, way] = lora_state_dict(trainer.lightning_module)
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
