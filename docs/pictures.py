"""Draw the pictures of the pages: the way of a run, losses against rates, memory by part, accumulation that changes.

    python -m docs.pictures

Writes docs/images/*.svg, numbers from the files and tables that the pages name. tests/test_docs.py compares them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import log10
from pathlib import Path

from docs.svg import arrow, box, drawing, text

DOCS = Path(__file__).parent
STEPS = {
    "plan": ("Is LoRA enough? Which rank, memory, time?", "lightning-lora plan MODEL ROWS --write-config plan.yaml"),
    "train": ("Learn from the rows, or in a module of your own", "lightning-lora fit --config plan.yaml"),
    "watch": ("Do adapters learn? Batch too large? Rank used up?", "LoRAGuard, BatchSizeMonitor, CapacityMonitor"),
    "compare": ("What is lost against full fine-tuning?", "lightning-lora study --config plan.yaml --hours 2"),
    "ship": ("An adapter for PEFT or vLLM, or a merged model", "lightning-lora export RUN OUT"),
}
SWEEP = DOCS / "findings" / "facts_over_capacity" / "results.csv"
ARMS = {"full": "soft", "rank 16": "line", "rank 4": "second", "rank 1": "third"}
MULTIPLIER = 10
"""Of the rate of adapters in that study: the default."""
MEMORY = DOCS / "start" / "lora_or_full.md"
PARTS = {
    "weights": "edge",
    "adapters": "fourth",
    "gradients": "third",
    "optimizer": "second",
    "activations": "line",
    "logits": "soft",
}


def way() -> str:
    """From a plan to a served model: a row for each step, with its question and its command."""
    lines = []
    for row, (name, (question, command)) in enumerate(STEPS.items()):
        y = 14 + 66 * row
        lines += [
            box(14, y, 96, 46, "trained" if name in ("train", "watch") else "box"),
            text(62, y + 28, name, "bold middle"),
            text(128, y + 18, question),
            text(128, y + 39, command, "small"),
        ]
        lines += [arrow(f"M62 {y + 46} L62 {y + 64}")] if row < len(STEPS) - 1 else []
    return drawing(520, 14 + 66 * len(STEPS), "The way of a run: plan, train, watch, compare, ship", lines)


def sweeps() -> dict[str, list[tuple[float, float]]]:
    """Of each arm: rates of Adam and losses of the selection runs, in the order of the rates."""
    with SWEEP.open() as file:
        runs = [run for run in csv.DictReader(file) if run["phase"] == "selection" and run["arm"] in ARMS]
    found = {arm: [run for run in runs if run["arm"] == arm] for arm in ARMS}
    return {
        arm: sorted(
            (float(run["learning_rate"]) * (1 if arm == "full" else MULTIPLIER), float(run["loss"])) for run in of_arm
        )
        for arm, of_arm in found.items()
    }


def rates() -> str:
    """Loss against the rate, both on log scales, for full fine-tuning and three ranks; a ring at the best rate."""
    left, top, width, height = 64, 20, 400, 250

    def place(rate: float, loss: float) -> tuple[float, float]:
        return left + (log10(rate) + 4.2) / 2.4 * width, top + (1 - log10(loss)) / 5 * height

    lines = [f'<path d="M{left} {top} V{top + height} H{left + width}"/>']
    for power in (-4, -3, -2):
        x = place(10.0**power, 1)[0]
        lines += [text(x, top + height + 22, f"{10.0**power:g}", "small middle")]
    for power in range(-4, 2):
        y = place(1, 10.0**power)[1]
        lines += [text(left - 8, y + 4, f"{10.0**power:g}", "small end")]
        lines += [f'<path d="M{left} {y:g} H{left + width}" style="opacity: .25"/>']
    lines += [
        text(left + width / 2, top + height + 44, "learning rate that Adam gets", "small middle"),
        f'<g transform="rotate(-90 16 145)">{text(16, 145, "loss, nats a token", "small middle")}</g>',
    ]
    for arm, points in sweeps().items():
        colour = f"var(--{ARMS[arm]})"
        at = [place(*point) for point in points]
        lines.append(
            f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in at)}" style="stroke: {colour}; stroke-width: 2.5"/>'
        )
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill: {colour}"/>' for x, y in at]
        x, y = place(*min(points, key=lambda point: point[1]))
        lines += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" style="fill: none; stroke: {colour}; stroke-width: 2"/>',
            f'<text class="bold end" x="{x - 11:.1f}" y="{y + 16:.1f}" style="fill: {colour}">{arm}</text>',
        ]
    return drawing(490, 326, "Loss against learning rate: a valley for each rank and for full fine-tuning", lines)


def table_of_memory() -> dict[str, list[float]]:
    """GiB of each part of a step by method, from the table in the page."""
    rows = [line.strip("| ").split(" | ") for line in MEMORY.read_text().splitlines() if line.startswith("| ")]
    head = ["method, GiB", *PARTS, "total"]
    begin = rows.index(head) + 1
    return {name: [float(number) for number in numbers] for name, *numbers in rows[begin : begin + 3]}


def memory() -> str:
    """A bar for each method, of the parts of its memory."""
    found = table_of_memory()
    scale = 400 / max(sum(parts[:-1]) for parts in found.values())
    lines = []
    for row, (name, (*parts, total)) in enumerate(found.items()):
        x, y = 72.0, 14 + 44 * row
        lines.append(text(64, y + 21, name, "bold end"))
        for part, size in zip(PARTS, parts, strict=True):
            width = size * scale
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="32" style="fill: var(--{PARTS[part]})">'
                f"<title>{part}: {size:g} GiB</title></rect>"
            )
            x += width
        lines.append(text(x + 6, y + 21, f"{total:g} GiB", "small"))
    for place, part in enumerate(PARTS):
        x, y = 72 + 150 * (place % 3), 160 + 24 * (place // 3)
        lines += [f'<rect x="{x}" y="{y - 12}" width="14" height="14" style="fill: var(--{PARTS[part]})"/>']
        lines += [text(x + 20, y, part, "small")]
    return drawing(540, 200, "Memory of a training step by method and part", lines)


def accumulation() -> str:
    """Micro-batches in a row, each step a frame; where a step begins, accumulation is halved."""
    lines, x, rows = [], 14.0, 4
    starts = []
    for step, count in enumerate((8, 8, 4, 4, 4, 2, 2)):
        starts.append((x, count))
        lines.append(box(x, 62, 13 * count + 3, 34, "box"))
        lines += [box(x + 3 + 13 * each, 67, 10, 24, "trained") for each in range(count)]
        lines.append(
            text(x + (13 * count + 3) / 2, 116, f"{count * rows} rows" if step in (0, 1, 3) else "", "small middle")
        )
        x += 13 * count + 10
    lines.append(text(x - 32, 116, "8 rows", "small middle"))
    for (_, before), (start, after) in pairwise(starts):
        if before != after:
            lines += [
                arrow(f"M{start - 3:g} 44 L{start - 3:g} 60"),
                text(start - 3, 36, f"{before} to {after}", "bold middle"),
            ]
    lines += [text(14, 18, "signal-limited, a step has just ended: accumulation is halved", "small")]
    return drawing(x + 4, 130, "Steps of 32 rows become steps of 16 and of 8, with micro-batches of 4 rows", lines)


PICTURES: dict[str, Callable[[], str]] = {"way": way, "rates": rates, "memory": memory, "accumulation": accumulation}


def files() -> Iterator[tuple[Path, str]]:
    """Each picture's file, and what it must hold."""
    return ((DOCS / "images" / f"{name}.svg", draw()) for name, draw in PICTURES.items())


if __name__ == "__main__":
    for path, picture in files():
        path.write_text(picture)
