"""One run on a GPU: what is right, how fast, what is held, in one table; at most nine minutes.

    python -m benchmarks.on_gpu --out runs/gpu --seconds 520    # on a machine with one
    python -m benchmarks.on_gpu --out runs/gpu --dry            # on a CPU, toy shapes: does it run at all

Every part runs in a forked child with a deadline of its own: a part that fails, hangs or takes the CUDA context down
costs itself only. The parent imports everything once and never touches CUDA. Parts come in order of what they tell;
those for which no time is left are named. Writes ``<part>.json`` and ``summary.md``, and prints the latter.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A parent that has touched CUDA cannot fork children that use it. bitsandbytes asks the card for its kind when it is
# imported, which PEFT does where it finds it: only parts that start afresh may.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# In a forked child, threads that load weights may fail to share torch's pool of threads.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
if __name__ == "__main__" and "--inner" not in sys.argv:
    sys.modules["bitsandbytes"] = None  # pyright: ignore[reportArgumentType]

import torch

from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.correctness import correctness
from benchmarks.gpu.elsewhere import resumed, sharded
from benchmarks.gpu.experts import experts
from benchmarks.gpu.groups import gated, groups
from benchmarks.gpu.head import head
from benchmarks.gpu.kernel_choice import TABLE, kernel_choice
from benchmarks.gpu.kernels import compiled, graphs, traced
from benchmarks.gpu.place import Place
from benchmarks.gpu.planned import planned
from benchmarks.gpu.step_memory import step_memory
from benchmarks.gpu.steps import step_1b, step_1b_short, step_8b, step_8b_whole
from benchmarks.gpu.training import quantised, trainer_runs

GPU_TESTS = (
    "tests/batch/noise/test_sample_precision.py",
    "tests/tasks/test_quantised_training.py",
    "tests/memory/test_other_devices.py",
    "tests/study/matched/test_on_a_gpu.py",
)


def marked_tests(place: Place) -> dict[str, Any]:
    """The tests that want a GPU, by themselves."""
    if place.dry:
        return {"skipped": "needs CUDA"}
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "-k", "cuda or gpu"]
    command = [sys.executable, "-m", "pytest", *options, *GPU_TESTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    return {"rc": done.returncode, "tail": done.stdout.splitlines()[-12:] + done.stderr.splitlines()[-3:]}


# In order of what they tell; seconds that each may take at most.
PARTS: dict[str, tuple[Callable[[Place], dict[str, Any]], int]] = {
    "ceilings": (ceilings, 30),
    "correctness": (correctness, 60),
    "step_1b": (step_1b, 60),
    "groups": (groups, 45),
    "step_8b": (step_8b, 60),
    "experts": (experts, 60),
    "head": (head, 35),
    "trainer_runs": (trainer_runs, 130),
    "planned": (planned, 150),
    "traced": (traced, 40),
    "graphs": (graphs, 40),
    "resumed": (resumed, 60),
    "step_1b_short": (step_1b_short, 30),
    "gated": (gated, 25),
    "step_memory": (step_memory, 75),
    "kernel_choice": (kernel_choice, 150),
    "sharded": (sharded, 40),
    "quantised": (quantised, 60),
    "compiled": (compiled, 100),
    "marked_tests": (marked_tests, 115),
    "step_8b_whole": (step_8b_whole, 60),
}
# Parts that start a Python of their own.
AFRESH = {"quantised", "planned"}
LEAST_SECONDS = 12
"""Below this no part is begun."""


def run_part(name: str, place: Place) -> None:
    """In the child: run, and write what was found, or what went wrong."""
    try:
        place.found.update(PARTS[name][0](place))
    except BaseException as reason:
        lines = traceback.format_exc().strip().splitlines()
        place.found.update({"failed": f"{type(reason).__name__}: {str(reason)[:300]}", "where": lines[-6:]})
    place.found.write()


def in_child(name: str, place: Place, seconds: float) -> str:
    """Fork, wait at most ``seconds``, end the child by its id; what went wrong, or nothing."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        log = os.open(place.out / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # Threads that begin together would each renew torch's pool of threads: "Invalid thread pool!".
        torch.set_num_threads(torch.get_num_threads())
        try:
            if name in AFRESH or torch.cuda.is_initialized():
                inner = ["--inner", name, "--work", str(place.out), *(["--dry"] if place.dry else [])]
                os.execv(sys.executable, [sys.executable, "-m", "benchmarks.on_gpu", *inner])
            run_part(name, place)
        finally:
            os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "" if status == 0 else f"ended with status {status}"
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"took more than {seconds:.0f} s"


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the parts while there is time; the lines of the summary, on disk after each part."""
    end, lines = time.monotonic() + arguments.seconds, []
    for name in arguments.only:
        function, most = PARTS[name]
        start = time.monotonic()
        if end - start < LEAST_SECONDS:
            lines.append(f"## {name}: no time was left")
            continue
        trouble = in_child(name, Place(arguments.dry, arguments.work, name), min(most, end - start))
        told = (function.__doc__ or "").splitlines()[0]
        title = f"## {name}: {told} ({time.monotonic() - start:.0f} s{', ' + trouble if trouble else ''})"
        path = arguments.work / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        lines += [title, *(f"- {key}: {json.dumps(value)}" for key, value in found.items())]
        print(title, flush=True)
        save(arguments, lines)
    return lines


def save(arguments: argparse.Namespace, lines: list[str]) -> None:
    """The summary, and few files: an archive of the rest, one trace, and the table of kernels."""
    (arguments.out / "summary.md").write_text("\n".join(lines) + "\n")
    with tarfile.open(arguments.out / "results.tgz", "w:gz") as archive:
        for file in sorted(arguments.work.iterdir()):
            if file.suffix in (".json", ".log"):
                archive.add(file, file.name)
    for name in ("trace.json.gz", TABLE):
        if (arguments.work / name).exists():
            shutil.copy(arguments.work / name, arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for summary.md, results.tgz, trace.json.gz and measured.json")
    parser.add_argument("--work", type=Path, help="folder for everything else (default: a temporary one)")
    parser.add_argument("--inner", choices=PARTS, help="run this part here and now")
    parser.add_argument("--seconds", type=float, default=520, help="time for all parts together (default: 520)")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="parts to run (default: all)")
    parser.add_argument("--dry", action="store_true", help="toy shapes on a CPU")
    arguments = parser.parse_args()
    if not arguments.inner and arguments.out is None:
        parser.error("--out is needed: the folder for the results")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    arguments.work = arguments.work or Path(tempfile.mkdtemp(prefix="on_gpu_"))
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.dry:
        torch.set_num_threads(1)  # a fork after threads have started would hang
    if arguments.inner:
        run_part(arguments.inner, Place(arguments.dry, arguments.work, arguments.inner))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    print("\n".join(run(arguments))[-11000:])


if __name__ == "__main__":
    main()
