"""Kill a training run in the middle of its saves, again and again, and look at what it leaves.

``python -m tests.integration.scripts.kill_trials IO [TRIALS] [FOLDER]`` prints one line of JSON. ``IO`` is ``verified``
(ours), ``lightning`` (Lightning's own) or ``in_place`` (ours, with the atomic write taken out, to see that the trials
see it). Every trial resumes from what the one before has left, so that a resume after a kill is tested as well. A
nightly run takes 50 trials; ``TMPDIR`` on another file system is where Lightning's own loses files.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_lora.callbacks import CheckpointGuard
from lightning_lora.checkpoints import verified_io as checkpoint_io
from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO
from lightning_lora.files.checkpoint_manifest import examine
from tests.support import toys

NUM_FLOATS = 3_000_000
"""12 MB: long enough to be hit by a kill, short enough for a second per trial."""


class Bulky(toys.Toy):
    """Every number of ``bulk`` is the step before the save: a file of two versions cannot look like one."""

    bulk: torch.Tensor

    def __init__(self, started: int) -> None:
        super().__init__()
        self.register_buffer("bulk", torch.zeros(NUM_FLOATS))
        self.started = started

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        os.write(self.started, b"!")
        self.bulk.fill_(self.global_step)


@contextmanager
def written_in_place(path: Path, *, keep_link: bool = True) -> Iterator[BinaryIO]:
    with open(path, "wb") as file:
        yield file


def train(folder: Path, io: str, started: int) -> None:
    if io == "in_place":
        checkpoint_io.atomic_file = written_in_place  # pyright: ignore[reportAttributeAccessIssue]
    last = folder / "last.ckpt"
    keep = ModelCheckpoint(
        folder, filename="{step}", save_last=True, every_n_train_steps=1, enable_version_counter=False
    )
    trainer = toys.trainer(
        folder,
        max_epochs=10_000,
        enable_checkpointing=True,
        plugins=[TorchCheckpointIO() if io == "lightning" else VerifiedCheckpointIO()],
        callbacks=[keep, *([] if io == "lightning" else [CheckpointGuard()])],
    )
    trainer.fit(Bulky(started), toys.loader(), ckpt_path=last if last.exists() else None)


def damage(path: Path, io: str) -> str | None:
    """What is wrong with a checkpoint, by its manifest and by what is in it."""
    if io != "lightning":
        finding = examine(path)
        if finding.damage is not None:
            return finding.damage
        if finding.version is None:
            return "it has no manifest"
    try:
        checkpoint = torch.load(path, weights_only=True)
    except Exception as error:  # any way of not loading counts
        return f"unreadable: {str(error).splitlines()[0]}"
    bulk = checkpoint["state_dict"]["bulk"]
    return None if bool((bulk == checkpoint["global_step"] - 1).all()) else "a mix of two steps"


def trials(folder: Path, io: str, count: int, seed: int = 0) -> dict[str, Any]:
    """How ``count`` killed runs end; a damaged folder is emptied, so that each trial can fail for itself."""
    moments, outcomes, steps = random.Random(seed), [], [0]
    in_the_middle = 0
    for _ in range(count):
        kill_one(folder, io, moments.uniform(0.0, 0.6))
        in_the_middle += any(path.suffix == ".tmp" for path in folder.iterdir())
        last = folder / "last.ckpt"
        problems = {path.name: problem for path in sorted(folder.glob("*.ckpt")) if (problem := damage(path, io))}
        if not problems and last.exists():
            step = torch.load(last, weights_only=True)["global_step"]
            problems |= {"last.ckpt": f"went back from step {steps[-1]} to {step}"} if step < steps[-1] else {}
            steps.append(step)
        elif steps[-1] and not last.exists():
            problems["last.ckpt"] = "is gone"
        outcomes.append(problems)
        if problems:
            steps.append(0)
            for path in folder.iterdir():
                path.unlink()
    return {
        "io": io,
        "trials": count,
        "damaged": sum(map(bool, outcomes)),
        "killed while a temporary file was there": in_the_middle,
        "steps": steps,
        "problems": [problems for problems in outcomes if problems],
    }


def kill_one(folder: Path, io: str, delay: float) -> None:
    ready, started = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            train(folder, io, started)
        finally:  # the copy of the test process must not go on as one
            os._exit(1)
    os.close(started)
    said = os.read(ready, 1)
    # From here on there is a save nearly all the time.
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.close(ready)
    _, status = os.waitpid(pid, 0)
    assert said, "the run ended before it began"
    assert os.WIFSIGNALED(status), "the run ended by itself"


if __name__ == "__main__":
    number = int(sys.argv[2]) if len(sys.argv) > 2 else 10
    with tempfile.TemporaryDirectory(dir=sys.argv[3] if len(sys.argv) > 3 else None) as name:
        print(json.dumps(trials(Path(name), sys.argv[1], number)))
