"""Is rank 1 enough for reinforcement learning (T6): six digits to be sorted, rewards for exact answers.

    PYTHONPATH=. python studies/rank_one.py

A small model learns the task in part from examples, and the rest from rewards: in full, and with adapters of rank 1 and
8, with and without the output layer. Controls: no reward, shuffled rewards, and examples at rank 1 instead of rewards.
Two smaller parts: right and shuffled rewards at low rates, and another task, six digits to be reversed. Each run is a
file below ``--out``; runs that have one are not repeated, several processes of this command share the work, and it may
be stopped and started again. The curves of all runs are written to ``results.csv`` in ``docs/findings/rank_one``,
``rank_one_shuffled`` and ``rank_one_reverse``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from typing_extensions import override

from lightning_lora import LoRAConfig
from lightning_lora.errors import RunFolderError
from lightning_lora.files.atomic import atomic_file
from lightning_lora.files.folder_lock import is_locked, release_lock, take_lock
from lightning_lora.lora.reports import count_parameters
from lightning_lora.planning.stop_signals import ending_at_once
from lightning_lora.tasks import CausalLM, PolicyGradient
from studies.modules import digits, reward_curves
from studies.modules.pages import FINDINGS, read_lines, write_lines

PROMPTS, GROUP, EVALUATIONS = 32, 8, 6
PARTS = {"rank_one": ("sort", 150), "rank_one_shuffled": ("sort", 60), "rank_one_reverse": ("reverse", 60)}
"""What is asked and for how many steps; each part has its own runs and its own folder in docs/findings."""
FULL_RATES = (3e-5, 5e-5, 1e-4, 2e-4, 3e-4)
LORA_RATES = (3e-4, 5e-4, 1e-3, 2e-3, 3e-3)
LOW_RATES = {"full": (3e-6, 1e-5, 3e-5), "r1+head": (3e-5, 1e-4, 3e-4)}
MIDDLE = 2
ARMS = ("full", "r1+head", "r8+head", "r1", "r8")
MULTIPLIER = 10.0


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        arm: What is trained: ``full``, or ``r1``, ``r8``, with ``+head`` where the output layer is adapted.
        rate: Learning rate of what is trained.
        seed: Of the warm start, the order of the prompts and the samples.
        control: ``none`` for rewards of right answers; ``zero``, ``shuffled``, or ``examples`` instead of rewards.
        part: One of `PARTS`.
    """

    arm: str
    rate: float
    seed: int
    control: str = "none"
    part: str = "rank_one"

    @property
    def name(self) -> str:
        """The file of the run, without its ending."""
        return f"{self.control}_{self.arm}_{self.rate:g}_{self.seed}"

    @property
    def task(self) -> digits.DigitTask:
        """What is asked."""
        return digits.TASKS[PARTS[self.part][0]]

    @property
    def steps(self) -> int:
        """Optimizer steps, a rollout each."""
        return PARTS[self.part][1]

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapters of the arm."""
        if self.arm == "full":
            return None
        return LoRAConfig(rank=int(self.arm[1]), adapt_head=self.arm.endswith("+head"), lr_multiplier=MULTIPLIER)

    @property
    def learning_rate(self) -> float:
        """The rate in terms of full fine-tuning, which tasks take."""
        return self.rate if self.lora is None else self.rate / MULTIPLIER


def rates_of(arm: str) -> Sequence[float]:
    """The grid of an arm, the middle first and then from the outside in."""
    rates = FULL_RATES if arm == "full" else LORA_RATES
    return [rates[place] for place in (MIDDLE, 0, 4, 1, 3)]


def cells(num_seeds: int) -> Iterator[Cell]:
    """All runs, the first seed first: every arm at the middle rate, controls, other rates; then the other parts."""
    for seed in range(num_seeds):
        middle = {arm: rates_of(arm)[0] for arm in ARMS}
        yield from (Cell(arm, rate, seed) for arm, rate in middle.items())
        yield from (Cell("r1+head", middle["r1+head"], seed, each) for each in ("zero", "shuffled", "examples"))
        yield Cell("full", middle["full"], seed, "shuffled")
        yield from (Cell(arm, rate, seed) for place in range(1, 5) for arm in ARMS for rate in [rates_of(arm)[place]])
    for seed in range(num_seeds):
        for arm, rates in LOW_RATES.items():
            for rate in rates:
                yield from (Cell(arm, rate, seed, each, "rank_one_shuffled") for each in ("shuffled", "none"))
        for arm in ("full", "r1+head", "r8+head", "r1"):
            yield from (Cell(arm, rate, seed, part="rank_one_reverse") for rate in rates_of(arm))


class Curve(Callback):
    """Keeps what every evaluation finds.

    Attributes:
        step: The optimizer step of an evaluation outside of training.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.step: int | None = None

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point."""
        names = ("val_reward", "val_reward_greedy", "reward", "entropy", "sampler_mismatch", "constant_groups")
        found = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        self.points.append({"step": trainer.global_step if self.step is None else self.step} | found)


def train(cell: Cell, folder: Path) -> dict[str, Any]:
    """Run a cell: its curve, its time and what it trained."""
    start = time.perf_counter()
    task, steps = cell.task, cell.steps
    # All parts have as many prompts, so that a shorter run is the beginning of a longer one.
    rows = task.questions(digits.HELD_OUT + PARTS["rank_one"][1] * PROMPTS, seed=0)
    held_out, prompts = rows[: digits.HELD_OUT], rows[digits.HELD_OUT :]
    base = folder / f"base_{PARTS[cell.part][0]}_{cell.seed}"
    if not (base / "tokenizer_config.json").exists():
        digits.warm_model(task, base, cell.seed, held_out)
    seed_everything(cell.seed, verbose=False)
    curve, settings = Curve(), {"model": str(base), "learning_rate": cell.learning_rate, "lora": cell.lora}
    policy = PolicyGradient(
        **settings,  # type: ignore[arg-type]
        reward=task.reward,
        reward_workers=0,
        group_size=GROUP,
        max_new_tokens=task.answer_tokens,
    )
    evaluated = digits.prompt_loader(held_out, digits.HELD_OUT)
    _trainer(curve).validate(policy, evaluated, verbose=False)
    if cell.control == "examples":
        examples = CausalLM(**settings)  # type: ignore[arg-type]
        _trainer(max_steps=steps).fit(examples, task.example_loader(prompts, PROMPTS, shuffle=True))
        policy.load_state_dict(examples.state_dict(), strict=False)
    else:
        schedule: dict[str, Any] = {"val_check_interval": steps // EVALUATIONS, "check_val_every_n_epoch": None}
        loader = digits.prompt_loader(prompts, PROMPTS, shuffle=True, control=cell.control)
        _trainer(curve, max_steps=steps, **schedule).fit(policy, loader, evaluated)
    # A run without rewards ends early.
    if curve.points[-1]["step"] < steps:
        curve.step = steps
        _trainer(curve).validate(policy, evaluated, verbose=False)
    trained = count_parameters(policy).trainable
    return dataclasses.asdict(cell) | {
        "trained": trained,
        "seconds": time.perf_counter() - start,
        "bits": policy.signal.bits,
        "points": curve.points,
    }


def _trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = dict.fromkeys(quiet, False) | {"logger": False, "num_sanity_val_steps": 0} | options
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **settings)


def run(folder: Path, num_seeds: int, most: int) -> None:
    """Run at most ``most`` cells that have no file yet and that no other living process has begun.

    SIGTERM and Ctrl-C end the run that is being done; what it had is lost.
    """
    for cell in cells(num_seeds):
        if most < 1:
            return
        done = folder / cell.part / f"{cell.name}.json"
        lock = done.with_suffix(".lock")
        if done.exists() or not _locked(lock, folder):
            continue
        try:
            with ending_at_once(f"run {cell.name}"):
                result = train(cell, folder)
            with atomic_file(done) as file:
                file.write(json.dumps(result, indent=1).encode())
        finally:
            release_lock(lock)
        most -= 1
        last = result["points"][-1]
        print(f"{cell.part} {cell.name}: {last} in {result['seconds']:.0f} s", flush=True)


def _locked(lock: Path, folder: Path) -> bool:
    """Take a lock, unless a living process has it."""
    try:
        take_lock(lock, folder)
    except RunFolderError:
        if is_locked(lock):
            return False
        raise
    return True


def table(folder: Path) -> list[dict[str, Any]]:
    """A line for every point of the curve of every run in ``folder``."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    kept = ("control", "arm", "rate", "seed", "trained", "bits", "seconds")
    names = ("step", "val_reward", "val_reward_greedy", "entropy", "sampler_mismatch")
    return [
        {name: result[name] for name in kept} | {name: point.get(name, "") for name in names}
        for result in found
        for point in result["points"]
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs", "rank_one"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1000, help="runs of this process at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(options.out, options.seeds, options.runs)
    for part in PARTS:
        if lines := table(options.out / part):
            write_lines(FINDINGS / part / "results.csv", lines)
            if part != "rank_one_shuffled":
                reward_curves.draw(read_lines(FINDINGS / part / "results.csv"), FINDINGS / part / "curves.png")


if __name__ == "__main__":
    main()
