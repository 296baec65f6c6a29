"""Write docs/evidence/architectures.md: what `targets="all"` adapts in each tested architecture, and the merge error.

    python -m docs.architectures

tests/architectures/test_architectures.py checks all columns but the last.
"""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path

import peft
import torch
import transformers

from lightning_lora import lora_layers, merge_lora
from tests.architectures import ARCHITECTURES, Architecture
from tests.architectures.adapted_model import AdaptedModel, difference

PAGE = Path(__file__).parent / "evidence" / "architectures.md"
HEADER = ("architecture", "family", "adapted weights", "left alone", "loads in PEFT", "merge error")
INTRODUCTION = """# Architectures

`LoRAConfig(targets="all")` adapts these weights, on tiny models with random weights. For each architecture,
`tests/architectures/test_architectures.py` adapts it, trains it for a step, saves, loads, merges and unmerges it. Every
parameter with two axes or more must be adapted, or be named under *left alone*. The *merge error* is the largest
difference between the outputs of the adapted and the merged model in float32, relative to the largest output.
`python -m docs.architectures` writes this page.
"""


def main() -> None:
    models = [AdaptedModel(entry) for entry in ARCHITECTURES]
    lines = [line([*columns(model), f"{merge_error(model):.0e}"]) for model in models]
    machine = f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}"
    table = [line(HEADER), line(["---"] * len(HEADER)), *lines]
    PAGE.write_text("\n".join([INTRODUCTION, *table, "", f"Measured on {machine}, peft {peft.__version__}.", ""]))


def columns(model: AdaptedModel) -> list[str]:
    """The cells of one line that do not depend on the machine."""
    layers = lora_layers(model.module).values()
    weights = Counter(spec.role for layer in layers for spec in layer.lora_specs.values())
    adapts = ", ".join(f"{count} {role}" for role, count in weights.items())
    return [model.entry.name, model.entry.family, adapts, left_alone(model.entry), model.entry.peft]


def left_alone(entry: Architecture) -> str:
    """Each reason with the parameters that it holds for."""
    reasons: dict[str, list[str]] = {}
    for pattern, reason in entry.left_out.items():
        reasons.setdefault(reason, []).append(f"`{pattern}`")
    return "; ".join(f"{reason} ({', '.join(patterns)})" for reason, patterns in reasons.items()) or "nothing"


def merge_error(model: AdaptedModel) -> float:
    """The last cell. Merges the model."""
    merge_lora(model.module)
    return difference(model.expected, model.output(model.module))


def line(cells: list[str] | tuple[str, ...]) -> str:
    """One line of the table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
