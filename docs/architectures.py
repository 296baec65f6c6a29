"""What `targets="all"` adapts in every architecture of the tests, and how exact merging is there.

    python -m docs.architectures

Writes docs/architectures.md. All but the last column is checked by tests/architectures/test_architectures.py.
"""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path

import peft
import torch
import transformers

from lightning_lora import merge_lora
from tests.architectures import ARCHITECTURES, Architecture
from tests.architectures.laws import adapted, difference, output

PAGE = Path(__file__).with_suffix(".md")
HEADER = ("architecture", "family", "adapted weights", "left alone", "loads in PEFT", "merge error")
INTRODUCTION = """# Architectures

What `LoRAConfig(targets="all")` adapts, on tiny models with random weights. `tests/architectures/test_architectures.py` adapts each
of them, trains it a step, saves, loads, merges and unmerges it; every parameter of two axes or more must be adapted
there or be named under *left alone*. The *merge error* is the largest difference between the outputs of the adapted and
of the merged model, relative to the largest output, in float32. `python -m docs.architectures` writes this page.
"""


def main() -> None:
    lines = [line([*columns(entry), f"{merge_error(entry):.0e}"]) for entry in ARCHITECTURES]
    machine = f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}"
    table = [line(HEADER), line(["---"] * len(HEADER)), *lines]
    PAGE.write_text("\n".join([INTRODUCTION, *table, "", f"Measured on {machine}, peft {peft.__version__}.", ""]))


def columns(entry: Architecture) -> list[str]:
    """The cells of one line that do not depend on the machine."""
    module, _ = adapted(entry)
    weights = Counter(spec.role for layer in module.modules() for spec in getattr(layer, "lora_specs", {}).values())
    adapts = ", ".join(f"{count} {role}" for role, count in weights.items())
    return [entry.name, entry.family, adapts, left_alone(entry), entry.peft]


def left_alone(entry: Architecture) -> str:
    """Reasons, each with the parameters it holds for."""
    reasons: dict[str, list[str]] = {}
    for pattern, reason in entry.left_out.items():
        reasons.setdefault(reason, []).append(f"`{pattern}`")
    return "; ".join(f"{reason} ({', '.join(patterns)})" for reason, patterns in reasons.items()) or "nothing"


def merge_error(entry: Architecture) -> float:
    """The last cell."""
    module, _ = adapted(entry)
    expected = output(entry, module)
    merge_lora(module)
    return difference(expected, output(entry, module))


def line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
