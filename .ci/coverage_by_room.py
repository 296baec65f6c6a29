"""Print coverage of lines and branches for each room of the package, from coverage's JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict

COUNTS = ("covered_lines", "num_statements", "covered_branches", "num_branches")


def share(covered: int, of: int) -> str:
    return f"{100 * covered / of:.1f} %" if of else "none"


rooms: dict[str, Counter[str]] = defaultdict(Counter)
for file, found in json.load(open(sys.argv[1], encoding="utf-8"))["files"].items():
    parts = file.removesuffix(".py").split("/")
    for room in (parts[parts.index("lightning_lora") + 1], "all"):
        rooms[room] += Counter({name: found["summary"].get(name, 0) for name in COUNTS})
print("| room | lines | branches |\n|---|--:|--:|")
for room, counts in sorted(rooms.items(), key=lambda item: (item[0] == "all", item[0])):
    lines, of_lines, branches, of_branches = (counts[name] for name in COUNTS)
    print(f"| {room} | {share(lines, of_lines)} of {of_lines:,} | {share(branches, of_branches)} of {of_branches:,} |")
