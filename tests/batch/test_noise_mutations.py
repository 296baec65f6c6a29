"""Each way in which noise scales are usually got wrong makes a test fail (research/batch_and_capacity.md, V20)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import toys

PACKAGE = toys.ROOT / "lightning_lora"
NOISE, MONITOR, RANKS = (
    "tests/batch/noise/test_noise_scale.py",
    "tests/callbacks/test_batch_size_monitor.py",
    "tests/integration/test_monitored_ranks.py",
)
OPEN = "        if meter is None or not meter.is_open:\n            return\n        # A rank"
CLIP = '        trainer.precision_plugin.clip_gradients(optimizer, trainer.gradient_clip_val or 1e9, "norm")\n'
# Each mutation: file, right line, wrong line, and the tests that must fail.
MUTATIONS = {
    "the rescale by accumulation is dropped": (
        "batch/noise/step_sample.py",
        "factor = 1 / shares",
        "factor = shares * 0 + 1",
        [MONITOR, "-k", "autograd_gives_by_hand"],
    ),
    "gradients are measured after clipping": (
        "callbacks/batch_size_monitor.py",
        OPEN,
        OPEN.replace("        # A rank", f"{CLIP}        # A rank"),
        [MONITOR, "-k", "clipping_comes_after"],
    ),
    "a mean of ratios is taken": (
        "batch/noise/noise_scale.py",
        "signal, trace = weights @ signals, weights @ traces",
        "signal, trace = weights @ signals, (weights @ signals) * (weights @ (traces / signals))",
        [NOISE, "-k", "noise_scale_of_the_teacher"],
    ),
    "negative signals are clamped": (
        "batch/noise/noise_scale.py",
        "return mean_of_squares - trace * one, trace",
        "return (mean_of_squares - trace * one).clamp(min=0), trace",
        [NOISE, "-k", "called_inconclusive"],
    ),
    "the mean is that of one rank": (
        "batch/noise/micro_gradients.py",
        "mean_squares = self._sum_over_shards(self._square(",
        "mean_squares = (self._square(",
        [RANKS, "-k", "fsdp2"],
    ),
}
# One process imports the libraries and forks for every mutation: most of the time is spent on these imports.
RUN = """
import json, os, sys
from pathlib import Path
import lightning.pytorch, pytest, torch, transformers

for name, (folder, arguments) in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        output = os.open(Path(folder, "output"), os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # Before the repository on the path, in this process and in those that tests start.
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ["PYTHONPATH"]])
        import lightning_lora

        code = pytest.main(arguments) if lightning_lora.__file__.startswith(folder) else 99
        sys.stdout.flush()
        os._exit(code)
    print(json.dumps([name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]), flush=True)
"""


def mutated(folder: Path, file: str, right: str, wrong: str) -> None:
    """Make a copy of the package by links, with one mutated file."""
    text = (PACKAGE / file).read_text()
    assert text.count(right) == 1, f"{file} has changed: write down anew how to break it"
    source = PACKAGE
    target = folder / "lightning_lora"
    for part in Path(file).parts:
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.name not in (part, "__pycache__"):
                (target / path.name).symlink_to(path)
        source, target = source / part, target / part
    target.write_text(text.replace(right, wrong))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of the tests of each mutation."""
    runs, folders = {}, {}
    for place, (name, (file, right, wrong, tests)) in enumerate(MUTATIONS.items()):
        folder = folders[name] = tmp_path_factory.mktemp(f"mutation{place}")
        mutated(folder, file, right, wrong)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(folder / "pytest")]
        # Plugins among the imported libraries cannot be rewritten any more.
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        runs[name] = str(folder), [*options, *tests]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(runs)],
        cwd=toys.ROOT,
        env=os.environ | {"PYTHONPATH": str(toys.ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
        timeout=1200,
    )
    codes = dict(map(json.loads, done.stdout.splitlines()))
    return {name: (codes[name], (folder / "output").read_text()) for name, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize("broken", MUTATIONS)
def test_a_usual_mistake_is_found(broken: str, outcomes: dict[str, tuple[int, str]]) -> None:
    code, output = outcomes[broken]
    assert code == 1, f"{broken}, and no test tells\n{output[-5000:]}"
    assert "AssertionError" in output
