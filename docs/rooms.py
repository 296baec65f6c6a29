"""Draw the rooms of the package and who imports whom, from the imports themselves.

    python -m docs.rooms

Writes docs/images/rooms.svg. tests/test_docs.py fails where the picture no longer tells the truth.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from docs.svg import drawing
from tests.support.imports import MODULES, imports, room
from tests.test_architecture import ROOMS

PICTURE = Path(__file__).parent / "images" / "rooms.svg"
ABOUT = {
    "cli": "commands",
    "study": "runs compared in pairs",
    "planning": "what a run needs, before it",
    "tasks": "LightningModules ready to run",
    "callbacks": "one callback a file",
    "capacity": "whether adapters have room",
    "memory": "of a training step, traced",
    "batch": "rows of a step, and their noise",
    "mixin": "LoRA in a LightningModule",
    "checkpoints": "what they hold, exact resume",
    "sharding": "strategies, FSDP2, tensor parallel",
    "files": "adapter folders, merging, safetensors",
    "data": "files and datasets to batches",
    "lora": "LoRA on any module",
    "trainer_access": "callbacks and folder of a Trainer",
    "effective_batch": "rows of an optimizer step",
    "batch_facts": "known of a batch",
    "step_memory": "what a step keeps",
    "lightning_private": "private attributes of Lightning",
    "this_command": "what was typed",
    "allowed_imports": "packages that a config may name",
    "versions": "of installed packages",
    "lightning_messages": "left out for a while",
    "hub": "hub access",
    "student_t": "Student's t",
    "time_limit": "what need not end",
    "errors": "every error; all rooms import it, without an arc",
}
LEFT_OUT = {"__init__", "__main__"}
ROW, LEFT, WIDTH, TOP = 46, 16, 340, 16


def edges() -> Counter[tuple[str, str]]:
    """Number of imports from a room to another."""
    found: Counter[tuple[str, str]] = Counter()
    for name in MODULES:
        for other in imports(name) & MODULES.keys():
            pair = room(name), room(other)
            if pair[0] != pair[1] and pair[1] != "errors" and not LEFT_OUT & set(pair):
                found[pair] += 1
    return found


def size(name: str) -> str:
    count = sum(room(module) == name for module in MODULES)
    return f"{count} files" if count > 1 else ""


def picture() -> str:
    """An SVG: rooms from the top to the ground, an arc for the imports between two, thicker for more."""
    order = [name for name in reversed(ROOMS) if name not in LEFT_OUT]
    middle = {name: TOP + ROW * row + ROW / 2 for row, name in enumerate(order)}
    lines = []
    for name in order:
        y = middle[name]
        kind = "ground" if MODULES[f"lightning_lora.{name}"].stem == name else "box"
        lines += [
            f'<rect class="{kind}" x="{LEFT}" y="{y - 19:g}" width="{WIDTH}" height="38" rx="5"/>',
            f'<text x="{LEFT + 10}" y="{y - 2:g}">{name}</text>',
            f'<text class="small" x="{LEFT + 10}" y="{y + 13:g}">{ABOUT[name]}</text>',
            f'<text class="small" x="{LEFT + WIDTH - 10}" y="{y - 2:g}" text-anchor="end">{size(name)}</text>',
        ]
    right = LEFT + WIDTH
    for (importer, imported), count in sorted(edges().items()):
        start, end = middle[importer], middle[imported]
        # Arcs to the right run down; one to the left would run up.
        out = right + (end - start) * 0.55 if end > start else LEFT + (end - start) * 0.55
        side = right if end > start else LEFT
        width = 1 + min(count, 24) / 6
        lines.append(
            f'<path d="M{side} {start + 6:g} C{out:g} {start + 6:g} {out:g} {end - 6:g} {side} {end - 6:g}" '
            f'style="stroke: var(--line); stroke-opacity: .55; stroke-width: {width:.1f}">'
            f"<title>{importer} imports {imported}: {count}</title></path>"
        )
    height, width = TOP * 2 + ROW * len(order), right + round(ROW * len(order) * 0.45)
    return drawing(width, height, "Rooms of lightning_lora: every import runs down", lines)


if __name__ == "__main__":
    PICTURE.write_text(picture())
