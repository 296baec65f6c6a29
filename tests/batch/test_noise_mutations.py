"""Each way in which noise scales are usually got wrong makes a test fail (research/batch_and_capacity.md, V20)."""

from __future__ import annotations

import os
import shutil
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
# What is broken: file, line as it is, line as it must not be, and the tests that must tell.
MUTATIONS = {
    "the rescale by accumulation is dropped": (
        "batch/noise/step_sample.py",
        "factor = 1 / (weights * averaged_ranks)",
        "factor = weights * 0 + 1",
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
# The changed package is imported before pytest puts this repository first on the path.
RUN = "import sys; sys.path.insert(0, sys.argv[1]); import lightning_lora, pytest; sys.exit(pytest.main(sys.argv[2:]))"


@pytest.mark.slow
@pytest.mark.parametrize("broken", MUTATIONS)
def test_a_usual_mistake_is_found(broken: str, tmp_path: Path) -> None:
    file, right, wrong, tests = MUTATIONS[broken]
    shutil.copytree(PACKAGE, tmp_path / "lightning_lora", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (tmp_path / "lightning_lora" / "assets").symlink_to(PACKAGE / "assets")
    text = (PACKAGE / file).read_text()
    assert text.count(right) == 1, f"{file} has changed: write down anew how to break it"
    (tmp_path / "lightning_lora" / file).write_text(text.replace(right, wrong))
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(tmp_path / "pytest")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), *options, *tests],
        cwd=toys.ROOT,
        # The processes that tests start find the changed package first, too.
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(toys.ROOT)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 1, f"{broken}, and no test tells\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
    assert "AssertionError" in done.stdout
