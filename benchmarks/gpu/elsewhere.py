"""The same run somewhere else: gone on with on another device, sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.place import Place
from benchmarks.gpu.training import TINY, causal_lm, fit, gsm8k
from lightning_lora.sharding import FSDP2Strategy

STEPS = 8


def resumed(place: Place) -> dict[str, Any]:
    """Four steps on one device, four on another, against eight on the first: on one device bit for bit."""
    torch.backends.cuda.matmul.allow_tf32 = False
    gpu = place.pick("gpu", "cpu")
    steps = place.pick(STEPS, 2)
    whole = {device: _losses(place, device, steps) for device in dict.fromkeys((gpu, "cpu"))}
    for first, second in ((gpu, gpu), ("cpu", gpu), (gpu, "cpu")):
        path = place.out / f"{first}.ckpt"
        _losses(place, first, steps // 2, save=path)
        later = _losses(place, second, steps, start=path)
        place.found[f"{first} then {second}"] = largest_difference(later, whole[first][steps // 2 :])
        path.unlink()
    return place.found


def _losses(
    place: Place, accelerator: str, steps: int, start: Path | None = None, save: Path | None = None
) -> list[float]:
    module = causal_lm(TINY, learning_rate=1e-3, lora={"rank": 8})
    path = None if start is None else str(start)
    clock, trainer = fit(place, module, gsm8k(place, 4, 128), steps, ckpt_path=path, accelerator=accelerator)
    if save:
        trainer.save_checkpoint(save)
    return [float(loss) for loss in clock.losses]


def sharded(place: Place) -> dict[str, Any]:
    """FSDP2 of one rank, NCCL on a GPU: the losses of one device."""
    losses: list[list[float]] = []
    for strategy in ("auto", FSDP2Strategy()):
        module = causal_lm(TINY, lora={"rank": 8})
        clock, _ = fit(place, module, gsm8k(place, 4, 128), place.pick(5, 2), precision="bf16-true", strategy=strategy)
        losses.append([float(loss) for loss in clock.losses])
    return {"losses": losses, "largest difference": largest_difference(*losses)}


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
