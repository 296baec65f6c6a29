"""Rows to cached tokens, beside ``datasets.map`` with the plain tokenizer: time, and how memory grows.

    python -m benchmarks.data --rows 200000 --repetitions 1

Both read the same JSON lines, render them by the chat template and tokenise them, a thousand together, and write Arrow
files. Ours reads the columns of any format, finds what is trained on, checks each row, and counts what it tells;
``datasets.map`` does none of that. Every measurement is a process of its own with an empty cache, in an order drawn
anew, with one thread for the tokenizer. Prints a Markdown table: seconds and CPU seconds (medians), rows per CPU
second, and the growth of peak memory from the first tokeniser call on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import load, machine
from lightning_lora.memory.process_peak import peak_bytes

NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ida", "Jon"]
THINGS = ["apples", "stamps", "marbles", "pencils", "shells", "coins", "books", "tickets", "cards", "buttons"]


def make_rows(count: int, path: Path) -> None:
    """Write short arithmetic problems in the manner of GSM8K, the same ones for every run."""
    draw = random.Random(0)
    with path.open("w") as stream:
        for _ in range(count):
            name, thing, friends = draw.choice(NAMES), draw.choice(THINGS), draw.randint(2, 9)
            days = [draw.randint(2, 99) for _ in range(draw.randint(2, 5))]
            bought = ", then ".join(f"{number} {thing} on day {day}" for day, number in enumerate(days, start=1))
            question = f"{name} finds {bought}, and shares all of them among {friends} friends. How many does each get?"
            steps = [f"By day {day}, {name} has {'+'.join(map(str, days[:day]))} = {sum(days[:day])} {thing}."
                     for day in range(1, len(days) + 1)]  # fmt: skip
            answer = "\n".join([*steps, f"Each friend gets {sum(days)}/{friends} = <<{sum(days)}/{friends}>>."])
            stream.write(json.dumps({"question": question, "answer": f"{answer}\n#### {sum(days) // friends}"}) + "\n")


def ours(path: str, tokenizer: Any, num_proc: int) -> int:
    """`tokenise`, as the data module calls it."""
    from lightning_lora.data.settings import RowSettings
    from lightning_lora.data.sources import FileSource
    from lightning_lora.data.tokens import tokenise

    return len(tokenise(FileSource(path), tokenizer, RowSettings(1024), None, num_proc))


def plain(path: str, tokenizer: Any, num_proc: int) -> int:
    """``datasets``: read the lines, then map batches through the chat template and the tokenizer; no mask."""
    import datasets

    def tokens(rows: dict[str, list[str]]) -> dict[str, Any]:
        pairs = zip(rows["question"], rows["answer"], strict=True)
        chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    rows: Any = datasets.load_dataset("json", data_files=path, split="train")
    several = None if num_proc == 1 else num_proc
    return len(rows.map(tokens, batched=True, remove_columns=rows.column_names, num_proc=several))


WAYS: dict[str, Callable[[str, Any, int], int]] = {"lightning_lora": ours, "datasets.map": plain}


def measure(way: str, path: str, num_proc: int) -> dict[str, float]:
    """Seconds, CPU seconds and bytes of one way, in this process."""
    import datasets
    from transformers import AutoTokenizer

    import lightning_lora.data.tokens  # noqa: F401 - imports are not measured
    from lightning_lora.cli.embedded import MODEL

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True)
    before, start = _peak_bytes(), (time.perf_counter(), _cpu_seconds())
    count = WAYS[way](path, tokenizer, num_proc)
    seconds, cpu = time.perf_counter() - start[0], _cpu_seconds() - start[1]
    return {"rows": count, "seconds": seconds, "cpu": cpu, "bytes": _peak_bytes() - before}


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _peak_bytes() -> int:
    """The most memory that this process has held."""
    return peak_bytes(torch.device("cpu")) or 0


def measured(way: str, path: Path, num_proc: int) -> dict[str, float]:
    """`measure` in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        variables = {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "benchmarks.data", "--measure", way, str(path), "--num-proc", str(num_proc)]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--num-proc", type=int, default=1)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, path = arguments.measure
        print(json.dumps(measure(way, path, arguments.num_proc)))
        return
    before = load()
    print(
        "| rows | | seconds | CPU seconds | rows per CPU second | to `datasets.map` | memory MiB |\n" + "|---" * 7 + "|"
    )
    for count in arguments.rows:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
        with tempfile.TemporaryDirectory() as folder:
            make_rows(count, file := Path(folder, "rows.jsonl"))
            for _ in range(arguments.repetitions):
                for name in random.sample(list(WAYS), len(WAYS)):
                    found[name].append(measured(name, file, arguments.num_proc))
        for name, runs in found.items():
            wall, cpu, memory = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu", "bytes"))
            ratios = [run["cpu"] / other["cpu"] for run, other in zip(runs, found["datasets.map"], strict=True)]
            numbers = f"{wall:.1f} | {cpu:.1f} | {count / cpu:,.0f} | {statistics.median(ratios):.2f}"
            print(f"| {count:,} | {name} | {numbers} | {memory / 2**20:.0f} |", flush=True)
    print(f"\n{machine(torch.device('cpu'))}\nload {before} before, {load()} after")


if __name__ == "__main__":
    main()
