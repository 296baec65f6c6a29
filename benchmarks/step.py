"""One LoRA training step against full fine-tuning, the floor, PEFT and others: same weights, same A and B, same batch.

    python -m benchmarks.step --workload llama-28m --threads 2 --out runs/benchmarks

All contenders run in this process, in an order drawn anew each repetition, after their gradients were compared with
float64. Writes ``<workload>.json``, ``.md`` and ``.png`` and prints the Markdown. ``benchmarks.other_layers`` says how
litgpt and loralib take part. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, report
from benchmarks.contenders import FLOOR, FULL, OURS, PEFT, Contender, Trainee, contenders
from benchmarks.gradients import TOLERANCE, Check, check, reference
from benchmarks.machine import disturbed, load, machine
from benchmarks.other_layers import NotApplicableError
from benchmarks.setting import Setting, fresh_copy, prepared
from benchmarks.timing import interleave, train_step
from benchmarks.workloads import WORKLOADS

BASELINES = (FLOOR, FULL, PEFT, OURS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_all(setting: Setting, entrants: Mapping[str, Contender]) -> tuple[dict[str, Check], dict[str, report.Result]]:
    """Errors of every contender, and results of those that cannot take part."""
    base, adapter, batch = setting
    right = reference(base, adapter, batch)
    errors: dict[str, Check] = {}
    left_out: dict[str, report.Result] = {}
    for name, contender in entrants.items():
        try:
            trainee = contender.adapt(fresh_copy(base, contender.trains_base), adapter)
        except NotApplicableError as reason:
            left_out[name] = report.Result(str(reason))
            continue
        errors[name] = check(trainee, batch, right)
    limit = _tolerance(next(base.parameters()).dtype, errors)
    for name, error in errors.items():
        if not error.passed(limit):
            status = f"failed the check against float64: loss off by {error.loss:.1e}, a gradient by "
            left_out[name] = report.Result(f"{status}{error.gradient:.1e}, allowed {limit:.1e}", *error)
    return errors, left_out


def _tolerance(dtype: torch.dtype, errors: Mapping[str, Check]) -> float:
    """In float32 a fixed one; below, nobody may be less exact than PEFT is in its less exact setting.

    One limit for both errors: that of a loss is a single draw, small by luck in one contender and not in the next.
    """
    if dtype == torch.float32:
        return TOLERANCE
    theirs = [max(error) for name, error in errors.items() if name.startswith(PEFT)]
    if not theirs:
        raise ValueError("below float32 PEFT's error is the measure: do not leave PEFT out with --only.")
    return max(theirs)


def measure(
    setting: Setting, entrants: Mapping[str, Contender], repetitions: int, warmups: int
) -> dict[str, report.Result]:
    """Check, then weigh, then time."""
    base, adapter, batch = setting
    errors, results = check_all(setting, entrants)
    trainees: dict[str, Trainee] = {}
    for name in [name for name in errors if name not in results]:
        contender = entrants[name]
        model = fresh_copy(base, contender.trains_base)
        trainees[name], peak = memory.peak_bytes(model, adapter, contender, batch)
        optimizer = trainees[name].optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        results[name] = report.Result(
            "timed",
            *errors[name],
            trainable=sum(p.numel() for group in groups for p in group["params"]),
            peak_bytes=peak,
            saved_bytes=memory.saved_bytes(trainees[name], batch),
        )
    steps = {name: partial(train_step, trainee, batch) for name, trainee in trainees.items()}
    for name, times in interleave(steps, repetitions, warmups).items():
        results[name].times = times
    return {name: results[name] for name in entrants}


def run(name: str, settings: Mapping[str, Any], device: torch.device, only: list[str], folder: Path) -> str:
    """Run one workload and write its report; returns the Markdown."""
    before = load()
    workload = WORKLOADS[name]
    entrants = {key: value for key, value in contenders().items() if not only or key in only}
    rank, dtype, supervised, seed = settings["rank"], settings["dtype"], settings["supervised"], settings["seed"]
    with prepared(workload, rank, device, DTYPES[dtype], supervised, seed) as setting:
        results = measure(setting, entrants, settings["repetitions"], settings["warmups"])
        base = setting.base
    after = load()
    about = {
        "workload": {
            "name": name,
            "about": workload.about,
            "parameters": sum(p.numel() for p in base.parameters()),
            "tokens": workload.rows * workload.length,
            "rows": workload.rows,
            "length": workload.length,
            "supervised": supervised,
            # How transformers multiplies by experts where nothing is adapted; None for models without.
            "experts": getattr(getattr(base, "config", None), "_experts_implementation", None),
        },
        "settings": dict(settings),
        "machine": machine(device),
        "load": {"before": before, "after": after, "disturbed": disturbed(before, after)},
    }
    return report.write(folder, about, results, BASELINES)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=["llama-28m"], choices=WORKLOADS, help="one or more")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--warmups", type=int, default=5, help="repetitions thrown away")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each operator on the CPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens with labels, above 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", type=Path, help="folder with litgpt and loralib")
    parser.add_argument("--only", nargs="+", default=[], help="names of contenders as the report has them")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    # Lightning's remarks on learning rates, once a contender and time.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    if arguments.packages is not None:
        # Last, so that it replaces nothing that is installed.
        sys.path.append(str(arguments.packages))
    unknown = set(arguments.only) - contenders().keys()
    if unknown:
        raise SystemExit(f"unknown contenders {sorted(unknown)}; there are {sorted(contenders())}")
    names = ("repetitions", "warmups", "threads", "rank", "dtype", "supervised", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    for workload in arguments.workload:
        print(run(workload, settings, arguments.device, arguments.only, arguments.out))


if __name__ == "__main__":
    main()
