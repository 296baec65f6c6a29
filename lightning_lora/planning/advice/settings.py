"""Learning rate, batch and steps that a plan recommends, each with its reason and source."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_lora.batch.division import divisors
from lightning_lora.planning.advice.epoch import Epoch, RunLength
from lightning_lora.planning.reason import Reason

FEW_STEPS, ENOUGH_STEPS = 100, 1000
"""Below the first number of optimizer steps a run is starved, whatever its settings; the second is better."""
LEAST_ROWS, MOST_ROWS = 8, 128
"""Bounds of the recommended rows per optimizer step."""
ALARM = "WARNING"
"""How a reason begins that a page never leaves out."""
TML = "Schulman et al., LoRA Without Regret, 2025"
COOKBOOK = "tinker-cookbook, hyperparam_utils.py"
_EXPONENTS = {"llama": 0.781, "qwen3": 0.0775, "qwen3_moe": 0.0775}
"""The Tinker law 5e-5 x 10 x (2000 / hidden)^p by ``model_type``: it was fitted to these families only."""


@dataclass(frozen=True)
class PlannedBatch:
    """The rows of an optimizer step, and the steps that they make.

    Args:
        batch_size: Rows of a micro-batch on one device.
        accumulate_grad_batches: Micro-batches of an optimizer step on one device.
        devices: Devices that see different rows.
        steps: Optimizer steps of the run.
    """

    batch_size: int
    accumulate_grad_batches: int
    devices: int
    steps: int

    @property
    def rows(self) -> int:
        """Rows of an optimizer step."""
        return self.batch_size * self.accumulate_grad_batches * self.devices


def tinker_rate(model_config: Any) -> float | None:
    """The rate of full fine-tuning by the Tinker law, 5e-5 x (2000 / hidden)^p; None for other families."""
    if model_config is None:
        return None
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    power = _EXPONENTS.get(getattr(text, "model_type", ""))
    return None if power is None else 5e-5 * (2000 / text.hidden_size) ** power


def choose_rate(given: float | None, default: float | None, model_config: Any, applies: str) -> tuple:
    """The learning rate in full fine-tuning terms, and why.

    Args:
        given: The rate that the user has set; None if the class's default stands.
        default: The default of the module's class; None if it has no learning rate.
        model_config: The transformers config of the model, if it has one.
        applies: What trains at which multiple of this rate, in words; empty for full fine-tuning.

    Returns:
        The rate or None, and a `Reason`.
    """
    law = tinker_rate(model_config)
    if law is not None:
        law = float(f"{law:.2g}")
    applies = f"; {applies}" if applies else ""
    if given is not None:
        beside = f"; the Tinker law, fitted at batch 128, says {law:g}" if law is not None else ""
        return given, Reason(f"learning rate {given:g}", f"yours{applies}{beside}", TML)
    if law is not None:
        why = f"the Tinker law of this family, fitted at batch 128 in runs of 780 steps{applies}"
        return law, Reason(f"learning rate {law:g}", why, COOKBOOK)
    if default is None:
        return None, Reason("learning rate", f"the module sets its own{applies}", TML)
    why = f"the default of the class; no law was fitted to this model: sweep it (a factor of 3 up and down){applies}"
    return default, Reason(f"learning rate {default:g}", why, "no source has a rule for this model")


def choose_rows(epoch: Epoch, length: RunLength, devices: int) -> tuple[int, Reason]:
    """Rows per optimizer step: 32 x (rows / 10,000)^0.4 as a power of two, fewer while steps are below 100."""
    guess = 32 * ((epoch.rows or 10_000) / 10_000) ** 0.4
    rows = min(MOST_ROWS, max(LEAST_ROWS, 2 ** round(math.log2(guess))))
    full = rows

    def steps(rows: int) -> int:
        share = max(1, rows // devices)
        return length.steps(epoch, share, 1, devices)

    while rows > max(1, devices) and steps(rows) < FEW_STEPS and steps(rows // 2) > steps(rows):
        rows //= 2
    rows = max(devices, rows // devices * devices)
    why = "32 x (rows / 10,000)^0.4, a heuristic"
    if rows < full:
        why += f", lowered from {full} for more than {FEW_STEPS} steps"
    source = "exponent from pre-training (arXiv 2505.13738); LoRA tolerates large batches less (TML); sources disagree"
    return rows, Reason(per_step(rows), why, source)


def per_step(rows: int) -> str:
    """Rows of an optimizer step in words."""
    return f"{rows} row{'' if rows == 1 else 's'} per step"


def divide_step(rows: int, devices: int, largest: int, epoch: Epoch, length: RunLength) -> PlannedBatch:
    """Divide the rows of a step among devices and micro-batches of at most ``largest`` rows."""
    share = rows // devices
    micro = next(divisor for divisor in divisors(share) if divisor <= max(1, largest))
    accumulation = share // micro
    return PlannedBatch(micro, accumulation, devices, length.steps(epoch, micro, accumulation, devices))


def alarm(steps: int, multiplier: float) -> Reason | None:
    """What to say of few steps: below 100 the run is starved, whatever its batch noise."""
    if steps >= ENOUGH_STEPS:
        return None
    source = f"Tinker: >= {FEW_STEPS} steps, best >= {ENOUGH_STEPS}; linear-teacher pilots agree"
    if steps >= FEW_STEPS:
        return Reason(f"{steps:,} steps", f"enough to train; {ENOUGH_STEPS:,} are better: more epochs or rows", source)
    why = (
        f"{ALARM} step-starved: fewer than {FEW_STEPS} steps cost more than any other setting; more epochs or rows, or "
        "fewer rows per step help"
    )
    if multiplier != 1:  # adapters by the rule
        more = f"{multiplier * 1.5:g} in place of {multiplier:g}"
        why += f"; a multiplier of {more} for runs this short is anecdotal and not applied"
    return Reason(f"{steps:,} step{'' if steps == 1 else 's'}", why, source)
