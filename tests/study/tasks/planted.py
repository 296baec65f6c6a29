"""Scores of models whose truth is known, and a package that stands for lm-eval: it writes what lm-eval writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning_lora.study.tasks.judge import BySeed
from lightning_lora.study.tasks.samples import Scores

NAME = ("gsm8k", "exact_match, strict-match")

STAND_IN = """
import json, os, sys
import yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
assert sys.argv[1] == "run"
if "boom" in config["tasks"]:
    print("loading the task"); sys.exit("Task not found: boom")
out = os.path.join(config["output_path"], "model")
os.makedirs(out, exist_ok=True)
from pathlib import Path
count = int(config.get("limit", 8))
right = int(Path(config["model_args"]["pretrained"], "right.txt").read_text())
seen = {name: os.environ.get(name) for name in ("HF_ALLOW_CODE_EVAL", "HF_DATASETS_TRUST_REMOTE_CODE")}
Path(config["output_path"], "seen.json").write_text(json.dumps(seen))
stamp = "2026-11-27T12-00-00.000001"
results = {"configs": {task: {} for task in config["tasks"]}}
results["higher_is_better"] = {task: {"acc": True} for task in config["tasks"]}
Path(out, f"results_{stamp}.json").write_text(json.dumps(results))
for task in config["tasks"]:
    rows = [{"doc_id": n, "doc_hash": f"{task} {n}", "filter": "none", "metrics": ["acc"], "acc": float(n < right)}
            for n in range(count)]
    Path(out, f"samples_{task}_{stamp}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
"""``lm_eval/__main__.py`` of the package: a model answers as many questions right as its ``right.txt`` says."""


def stand_in(folder: Path) -> Path:
    """Write a package ``lm_eval`` into a folder, which then goes on the path."""
    (folder / "lm_eval").mkdir(parents=True)
    (folder / "lm_eval" / "__init__.py").write_text("")
    (folder / "lm_eval" / "__main__.py").write_text(STAND_IN)
    return folder


def scores(right: Callable[[int, int], float], seeds: int = 3, questions: int = 300) -> BySeed:
    """The scores of an arm: ``right(seed, question)`` is what it gets."""
    names = tuple(map(str, range(questions)))
    return {
        seed: {NAME: Scores(*NAME, names, tuple(right(seed, question) for question in range(questions)))}
        for seed in range(1, seeds + 1)
    }
